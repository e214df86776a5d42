"""docs/formats.md is enough to read what Ingot writes: a reader made from its text finds the same numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.config import Recipe, RopeScaling
from engine.kernels.reference import unpack_int4
from engine.models import names
from engine.models.rope import frequencies
from engine.models.rope_scaling import is_dynamic, rope_base
from engine.storage.kv_scale_files import write_kv_scales, write_layer_scales
from engine.storage.reshard import reshard
from engine.storage.workspace import WEIGHTS, Workspace
from tests.docs.formats_reader import Reader
from tests.engine.storage.tiny_workspace import SMALL, make_workspace, random_tensors

BIASED = replace(SMALL, num_kv_heads=4, qkv_bias=True, o_bias=True)
# Heads of 24 and groups of 32: rows of o_proj end within groups and tiles, columns of w_qkv within tiles.
CROOKED = replace(BIASED, hidden_size=96, head_dim=24, intermediate_size=160)
CASES = {
    "fp16": (BIASED, Recipe()),
    "bf16, heads that are not the hidden size, norms over heads": (
        replace(SMALL, num_kv_heads=4, head_dim=24, dtype="bfloat16", qk_norm=True),
        Recipe(),
    ),
    "int8, and a width that no tp divides": (replace(BIASED, intermediate_size=97), Recipe(weights="w8a8")),
    "int8 beside bf16": (replace(BIASED, dtype="bfloat16", qk_norm=True), Recipe(weights="w8a8")),
    "int4": (replace(BIASED, intermediate_size=128), Recipe(weights="w4a16", group_size=32)),
    "int4, nothing even": (CROOKED, Recipe(weights="w4a16", group_size=32)),
    "int4 with an int4 head": (BIASED, Recipe(weights="w4a16", group_size=32, head="int4")),
    "int4 with an int8 head": (BIASED, Recipe(weights="w4a16", group_size=32, head="int8")),
    "int4, groups smaller than tiles": (
        replace(CROOKED, intermediate_size=112),
        Recipe(weights="w4a16", group_size=16),
    ),
}
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, attention_factor=1.1)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    None,
    RopeScaling(kind="linear", factor=4.0),
    RopeScaling(kind="llama3", factor=8.0, **LLAMA3),
    YARN,
    replace(YARN, truncate=False, beta_slow=2.0),
    RopeScaling(kind="dynamic", factor=2.0),
    RopeScaling(kind="qwen"),
    RopeScaling(kind="turbomind", factor=1.5),
]


def dense(tensors, name):
    if f"{name}_scale" in tensors:
        return tensors[name].float() * tensors[f"{name}_scale"][:, None]
    if name in tensors:
        return tensors[name].float()
    module = name.removesuffix("weight")
    return unpack_int4(*(tensors[module + kind] for kind in names.QUANTIZED))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_found(tmp_path, case, tp):
    config, recipe = CASES[case]
    tensors = random_tensors(config, recipe)
    reader = Reader(make_workspace(tmp_path, config, recipe, tp, tensors))
    assert set(reader.weights) == set(names.model_tensors(config))
    for name, found in reader.weights.items():
        expected = dense(tensors, name).numpy()  # an int4 head has whole tiles of outputs
        np.testing.assert_array_equal(found, expected[: config.vocab_size] if name == names.HEAD else expected, name)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_heads_kv_scales_are_found_before_and_after_a_reshard(tmp_path, tp):
    folder = make_workspace(tmp_path / "two", BIASED, Recipe(kv="kv8"), 2, random_tensors(BIASED, Recipe()))
    rows = [[0.5, -0.25, 2.0, 1.0], [0.25, 0.5, 1.0, -3.0]]
    for layer in range(2):
        write_kv_scales(folder / WEIGHTS, layer, rows)
    reshard(folder, tmp_path / "other", tp)
    expected = np.repeat(np.array(rows, dtype=np.float32), 2, axis=0)
    for layer in range(2):
        np.testing.assert_array_equal(Reader(tmp_path / "other").kv_scales(layer), expected)


@pytest.mark.parametrize("tp", [1, 4])
def test_every_channels_kv_scales_are_found_before_and_after_a_reshard(tmp_path, tp):
    recipe = Recipe(kv="kv8", kv_granularity="channel")
    folder = make_workspace(tmp_path / "two", BIASED, recipe, 2, random_tensors(BIASED, Recipe()))
    rows = torch.rand(2, BIASED.num_kv_heads, BIASED.head_dim, 4, generator=torch.Generator().manual_seed(0)) + 0.01
    for layer in range(2):
        write_layer_scales(folder / WEIGHTS, layer, rows[layer], granularity="channel", tp=2)
    reshard(folder, tmp_path / "other", tp)
    for place in (folder, tmp_path / "other"):
        reader = Reader(place)
        assert reader.ingot["kv_granularity"] == "channel"
        for layer in range(2):
            np.testing.assert_array_equal(reader.channel_scales(layer), rows[layer])


@pytest.mark.parametrize("limit", [40, 64, 65, 200])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind if scaling else "none")
def test_what_is_said_of_the_rotary_embedding_is_enough(tmp_path, scaling, limit):
    config = replace(SMALL, max_position_embeddings=64, rope_scaling=scaling, rope_theta=5e5)
    folder = make_workspace(tmp_path, config, Recipe(), 1, random_tensors(config, Recipe()))
    found, factor = Reader(folder).frequencies(limit)
    stored = Workspace(folder).config
    assert stored.rope_scaling == scaling
    expected = frequencies(config, rope_base(config, limit) if is_dynamic(config) else config.rope_theta)
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, rtol=1e-5, atol=0)
    assert factor == (scaling.attention_factor if scaling else 1.0)
