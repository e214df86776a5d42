from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Recipe
from engine.models.cache import KVScales, PerToken
from engine.storage.kv_scale_files import (
    REACH,
    channels_file,
    covering_row,
    layer_of,
    num_runs,
    rank_file,
    read_scales,
    runs_file,
    write_kv_scales,
    write_layer_scales,
)
from engine.storage.reshard import reshard
from engine.storage.workspace import WEIGHTS, Workspace
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors

CONFIG = replace(SMALL, num_heads=4, num_kv_heads=4)


ROWS = st.tuples(
    st.floats(2**-10, 8.0, width=32),
    st.floats(-5.0, 5.0, width=32),
    st.floats(2**-10, 8.0, width=32),
    st.floats(-5.0, 5.0, width=32),
)


def read(folder: Path, *, heads: int, tp: int):
    """[kv_heads, 4]"""
    scales = read_scales(folder, replace(CONFIG, num_layers=1, num_kv_heads=heads, head_dim=2), "tensor", tp=tp)
    channels = layer_of(scales, 0)
    assert channels.shape == (heads, 2, 4) and torch.equal(channels[:, 0], channels[:, 1])
    return channels[:, 0]


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
    write_layer_scales(tmp_path, 0, heads[:, None].expand(-1, 2, -1), granularity="tensor", tp=tp)
    assert torch.equal(read(tmp_path, heads=len(pattern), tp=tp), heads)
    assert (tmp_path / runs_file(0)).is_file() == (runs > tp)


def test_a_rank_has_one_pair_for_all_its_heads(tmp_path):
    write_kv_scales(tmp_path, 0, [[0.1, 0.0, 0.2, 1.0], [0.3, -1.0, 0.4, 0.0]])
    assert (tmp_path / rank_file(0, 1)).read_bytes() == np.array([0.3, -1.0, 0.4, 0.0], dtype="<f4").tobytes()
    found = read(tmp_path, heads=4, tp=2)
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


def channel_scales(config=CONFIG, *, seed=0) -> KVScales:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim, 2)
    key, value = (torch.rand(shape, generator=generator) + 0.01 for _ in range(2))
    return KVScales(key=key, value=value)


def head_scales(config=CONFIG) -> KVScales:
    scales = channel_scales(config)
    return KVScales.of_heads(key=scales.key[:, :, 0], value=scales.value[:, :, 0], head_dim=config.head_dim)


def write_all(folder, scales, granularity, tp, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(config.num_layers):
        write_layer_scales(folder, layer, layer_of(scales, layer), granularity=granularity, tp=tp)


def equal(one: KVScales, other: KVScales) -> bool:
    return torch.equal(one.key, other.key) and torch.equal(one.value, other.value)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("granularity", "make"), [("channel", channel_scales), ("head", head_scales)])
def test_what_is_written_is_read_whatever_the_ranks(tmp_path, granularity, make, tp):
    scales = make()
    write_all(tmp_path, scales, granularity, tp)
    assert equal(read_scales(tmp_path, CONFIG, granularity, tp=tp), scales)
    assert (tmp_path / channels_file(1)).is_file() == (granularity == "channel")
    assert (tmp_path / runs_file(1)).is_file() == (granularity == "head" and tp < 4)


def test_channels_of_k_lie_in_turbominds_rotary_order_and_those_of_v_as_they_are(tmp_path):
    scales, size = channel_scales(), CONFIG.head_dim
    write_all(tmp_path, scales, "channel", 2)
    planes = np.fromfile(tmp_path / channels_file(1), dtype="<f4").reshape(4, 4, size)
    for j in range(size // 2):
        for b in range(2):
            np.testing.assert_array_equal(planes[:2, :, 2 * j + b].T, scales.key[1, :, j + b * size // 2])
    np.testing.assert_array_equal(planes[2:].transpose(1, 2, 0), scales.value[1])


@pytest.mark.parametrize("granularity", ["channel", "head"])
def test_every_rank_has_the_pair_that_covers_its_heads(tmp_path, granularity):
    """What an engine reads that knows no other: TurboMind's files."""
    scales = channel_scales() if granularity == "channel" else head_scales()
    write_all(tmp_path, scales, granularity, 2)
    for rank in range(2):
        row = np.fromfile(tmp_path / rank_file(0, rank), dtype="<f4").astype(np.float64)
        assert row.shape == (4,)
        for (scale, zero), pairs in ((row[:2], scales.key[0]), (row[2:], scales.value[0])):
            fine, middle = pairs[2 * rank : 2 * rank + 2].double().unbind(-1)
            assert zero - 127.5 * scale == pytest.approx(float((middle - 127.5 * fine).min()), rel=1e-4, abs=1e-4)
            assert zero + 127.5 * scale == pytest.approx(float((middle + 127.5 * fine).max()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("granularity", "make"), [("channel", channel_scales), ("head", head_scales)])
def test_another_tp_has_the_same_scales_and_back_the_same_bytes(tmp_path, granularity, make):
    recipe = Recipe(kv="kv8", kv_granularity=granularity)
    two = make_workspace(tmp_path / "two", CONFIG, recipe, 2, random_tensors(CONFIG, Recipe()))
    scales = make()
    write_all(two / WEIGHTS, scales, granularity, 2)
    assert Workspace(two).recipe == recipe
    for tp in (1, 4):
        reshard(two, tmp_path / f"{tp}", tp)
        workspace = Workspace(tmp_path / f"{tp}")
        assert equal(workspace.kv_scales(), scales) and workspace.recipe == recipe
        ranks = [workspace.rank_kv_scales(rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat([rank.value for rank in ranks], 1), scales.value)
        reshard(tmp_path / f"{tp}", tmp_path / f"{tp}-2", 2)
        assert contents(tmp_path / f"{tp}-2" / WEIGHTS) == contents(two / WEIGHTS)


def test_scales_of_every_token_are_a_key_and_no_file(tmp_path):
    recipe = Recipe(kv="kv8", kv_granularity="token")
    two = make_workspace(tmp_path / "two", CONFIG, recipe, 2, random_tensors(CONFIG, Recipe()))
    assert 'kv_granularity = "token"' in (two / WEIGHTS / "config.ini").read_text()
    reshard(two, tmp_path / "one", 1)
    for folder in ("two", "one"):
        workspace = Workspace(tmp_path / folder)
        assert workspace.recipe == recipe and workspace.kv_scales() == workspace.rank_kv_scales(0, 2) == PerToken()
        assert not list((tmp_path / folder / WEIGHTS).glob("*past_kv*"))


def test_channels_that_are_missing_damaged_or_cannot_be_are_named(tmp_path):
    """The pair of the rank beside them is never taken in their place."""
    write_all(tmp_path, channel_scales(), "channel", 1)
    path = tmp_path / channels_file(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"channels has {len(whole) - 4} bytes where {len(whole)} are expected"):
        read_scales(tmp_path, CONFIG, "channel", tp=1)
    planes = np.frombuffer(whole, dtype="<f4").copy()
    for place, value in ((0, 0.0), (len(planes) // 4, np.inf), (len(planes) // 2, -1.0), (len(planes) - 1, np.nan)):
        changed = planes.copy()
        changed[place] = value
        path.write_bytes(changed.tobytes())
        with pytest.raises(ValueError, match=r"layers\.1\.past_kv_scale\.channels are .*: they must be four finite"):
            read_scales(tmp_path, CONFIG, "channel", tp=1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"layers\.1\.past_kv_scale\.channels is missing"):
        read_scales(tmp_path, CONFIG, "channel", tp=1)
    scales = channel_scales()
    scales.key[0, 2, 5, 0] = 0.0
    with pytest.raises(ValueError, match="layer 0"):
        write_layer_scales(tmp_path / "new", 0, layer_of(scales, 0), granularity="channel", tp=1)
