from dataclasses import replace
from math import gcd

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Recipe
from engine.models import names
from engine.storage.rank_cuts import TILE, RankCut, ffn_share, rank_config, rank_cut
from tests.engine.storage.tiny_workspace import SMALL

INT4 = Recipe(weights="w4a16", group_size=128)
LLAMA2_7B = replace(
    SMALL, hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=11008, vocab_size=32000
)
MINIMIND2 = replace(SMALL, hidden_size=512, num_heads=8, num_kv_heads=2, head_dim=64, intermediate_size=1408)


@pytest.mark.parametrize(
    ("model", "tp", "groups", "spare"), [(LLAMA2_7B, 4, 22, 2), (MINIMIND2, 2, 6, 1), (LLAMA2_7B, 2, 43, 0)]
)
def test_an_ffn_is_cut_at_the_borders_of_groups(model, tp, groups, spare):
    share = ffn_share(model, INT4, tp)
    assert share == groups * 128 and share * tp - model.intermediate_size == spare * 128
    assert rank_cut(model, INT4, (names.DOWN,), tp) == RankCut(pieces=(share,), stored=share, group_size=128)
    both = rank_cut(model, INT4, names.GATE_UP, tp)
    assert both == RankCut(pieces=(share, share), stored=2 * share, group_size=128)
    assert rank_config(model, INT4, tp).intermediate_size == share


def test_in_16_bits_nothing_is_filled_up_that_tp_divides():
    assert ffn_share(LLAMA2_7B, Recipe(), 4) == 2752
    qkv = rank_cut(LLAMA2_7B, Recipe(), names.QKV, 4)
    assert qkv == RankCut(pieces=(1024, 1024, 1024), stored=3072, group_size=0)


def test_blocks_that_are_rotated_stay_whole():
    rotated = Recipe(weights="w8a8", rotate_down=8)
    assert ffn_share(LLAMA2_7B, rotated, 4) == 2752
    # 1408 are 176 blocks, 22 a rank; 88 are 11, and the last of two ranks has one of zeros.
    assert ffn_share(MINIMIND2, rotated, 8) == 176
    assert ffn_share(replace(SMALL, intermediate_size=88), rotated, 2) == 48
    assert ffn_share(replace(SMALL, intermediate_size=88), Recipe(weights="w8a8"), 2) == 44


@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([8, 16, 48, 64, 80, 96, 128]),
    group=st.sampled_from([16, 32, 64, 96, 128]),
    tp=st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=100, deadline=None)
def test_the_rows_of_wo_are_whole_heads_in_whole_groups_and_tiles(heads, head_dim, group, tp):
    model = replace(SMALL, hidden_size=heads * tp * head_dim, num_heads=heads * tp, num_kv_heads=tp, head_dim=head_dim)
    cut = rank_cut(model, Recipe(weights="w4a16", group_size=group), (names.OUTPUT,), tp)
    [rows] = cut.pieces
    assert rows == heads * head_dim and cut.group_size == gcd(group, rows)
    assert cut.stored % TILE == cut.stored % cut.group_size == 0 <= cut.stored - rows < TILE * cut.group_size
