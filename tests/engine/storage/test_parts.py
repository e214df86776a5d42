"""The blocks of a file: however small they are, they join to the same bytes."""

from dataclasses import replace

import pytest
import torch

from engine.config import Recipe
from engine.storage import parts, workspace
from engine.storage.parts import cast
from engine.storage.workspace import write_weights
from tests.engine.storage.tiny_workspace import SMALL, random_tensors

W4A16 = Recipe(weights="w4a16", group_size=32)
WIDE = replace(SMALL, hidden_size=192, num_heads=12, num_kv_heads=4, intermediate_size=160)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (WIDE, Recipe()),
        (replace(WIDE, dtype="bfloat16", qkv_bias=True, qk_norm=True, intermediate_size=172), Recipe()),
        (WIDE, W4A16),  # 160 / 4 features are filled up to 64 a rank: the last has 32, or none
        (replace(WIDE, num_heads=16, num_kv_heads=8, head_dim=8), W4A16),  # halves of heads that are no whole words
        (replace(WIDE, o_bias=True), replace(W4A16, group_size=16)),
        (replace(WIDE, dtype="bfloat16", o_bias=True, intermediate_size=97), Recipe(weights="w8a8")),
    ],
    ids=["fp16", "bf16", "w4a16", "w4a16-small-heads", "w4a16-bias", "w8a8"],
)
def test_files_are_the_same_however_small_the_blocks(tmp_path, monkeypatch, config, recipe, tp):
    tensors = random_tensors(config, recipe)
    write_weights(tmp_path / "whole", config, tensors.__getitem__, recipe=recipe, tp=tp)
    told: list[int] = []
    monkeypatch.setattr(parts, "BLOCK_BYTES", 1)
    monkeypatch.setattr(workspace, "BLOCK_BYTES", 1)
    entries = write_weights(
        tmp_path / "blocks", config, tensors.__getitem__, recipe=recipe, tp=tp, progress=told.append
    )
    files = {entry.path: (tmp_path / "whole" / entry.path).read_bytes() for entry in entries}
    assert {path.name: path.read_bytes() for path in (tmp_path / "blocks").iterdir()} == files
    assert sum(told) == sum(map(len, files.values())) and len(told) > 2 * len(files)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e6])
def test_a_value_that_the_type_does_not_hold_is_named(value):
    tensor = torch.zeros(3, 4)
    assert cast(tensor, torch.float16, "x").dtype is torch.float16
    assert cast(tensor[:0], torch.float16, "x").shape == (0, 4)
    tensor[1, 2] = value
    with pytest.raises(ValueError, match=r"w_qkv holds values that torch\.float16 cannot"):
        cast(tensor, torch.float16, "w_qkv")
