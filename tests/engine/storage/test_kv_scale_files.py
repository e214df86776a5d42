from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.storage.kv_scale_files import (
    REACH,
    covering_row,
    heads_of,
    num_runs,
    rank_file,
    read_kv_scales,
    runs_file,
    write_head_scales,
    write_kv_scales,
)

ROWS = st.tuples(
    st.floats(2**-10, 8.0, width=32),
    st.floats(-5.0, 5.0, width=32),
    st.floats(2**-10, 8.0, width=32),
    st.floats(-5.0, 5.0, width=32),
)


def read(folder: Path, *, heads: int, tp: int):
    return read_kv_scales(folder, num_layers=1, num_kv_heads=heads, head_dim=2, tp=tp)


@given(rows=st.lists(ROWS, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_one_pair_for_several_heads_reaches_what_each_of_theirs_did(rows):
    heads = torch.tensor(rows, dtype=torch.float32)
    covering = covering_row(heads)
    for at in (0, 2):
        low, high = (covering[at + 1] + sign * REACH * covering[at] for sign in (-1, 1))
        for row in heads.double().tolist():
            assert low <= row[at + 1] - REACH * row[at] + 1e-3 and row[at + 1] + REACH * row[at] <= high + 1e-3
    if len({*map(tuple, heads.tolist())}) == 1:
        assert covering == heads[0].tolist()


@pytest.mark.parametrize(("pattern", "runs"), [("aaaa", 1), ("aabb", 2), ("abab", 4), ("abbb", 4), ("ab", 2)])
@pytest.mark.parametrize("tp", [1, 2])
def test_every_head_has_its_scales_again_at_any_tp(tmp_path, pattern, runs, tp):
    heads = torch.tensor([[ord(letter) / 100, 0.5, 0.25, -0.5] for letter in pattern])
    assert num_runs(heads) == runs
    write_head_scales(tmp_path, 0, heads, tp)
    assert torch.equal(heads_of(read(tmp_path, heads=len(pattern), tp=tp), 0), heads)
    assert (tmp_path / runs_file(0)).is_file() == (runs > tp)


def test_a_rank_has_one_pair_for_all_its_heads(tmp_path):
    write_kv_scales(tmp_path, 0, [[0.1, 0.0, 0.2, 1.0], [0.3, -1.0, 0.4, 0.0]])
    assert (tmp_path / rank_file(0, 1)).read_bytes() == np.array([0.3, -1.0, 0.4, 0.0], dtype="<f4").tobytes()
    found = heads_of(read(tmp_path, heads=4, tp=2), 0)
    expected = torch.tensor([[0.1, 0, 0.2, 1]] * 2 + [[0.3, -1, 0.4, 0]] * 2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        (b"\0" * 12, "has 12 bytes where 16 are expected"),
        (np.array([0, 0, 1, 0], dtype="<f4").tobytes(), "scales above 0"),
        (np.array([1, np.inf, 1, 0], dtype="<f4").tobytes(), "finite"),
        (np.array([-1, 1], dtype="<f4").tobytes(), "scales above 0"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / rank_file(0, 0)).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        read(tmp_path, heads=2, tp=1)
    assert rank_file(0, 0) in str(error.value)
