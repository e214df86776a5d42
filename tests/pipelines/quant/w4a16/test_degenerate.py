"""Models and data at the edge, through the stages: a defined result, or an error that names what is wrong."""

import pytest
import torch
from safetensors.torch import load_file

from engine.kernels.reference import unpack_int4
from engine.models.batch import packed
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.workspace import load_workspace
from tests.pipelines.stage import FORMULA, W4A16, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

WAYS = {
    "rtn": {key: W4A16[key] for key in ("name", "group_size", "search", "symmetric", "clip")} | {"method": "rtn"},
    "search=none": FORMULA,
    "awq": W4A16 | {"method": "awq"},
    "gptq": W4A16 | {"method": "gptq"},
    "awq+gptq": W4A16,
    "symmetric": W4A16 | {"symmetric": True},
    "int4 head": W4A16 | {"head": "int4"},
    "int8 head": W4A16 | {"head": "int8"},
}
HIDDEN, INNER = 64, 96


def a_build(root, *, text=TEXT, replace=None, **changes):
    (root / "text.txt").write_text(text)
    return Build(root / "out", write_tiny_checkpoint(root / "model", replace=replace, **changes), root / "text.txt")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def edge_weights():
    """Every kind of edge in one model, and the names of the weights that lie on one."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    norm, keys, values = torch.ones(HIDDEN), random(32, HIDDEN), random(32, HIDDEN)
    gate, up = random(INNER, HIDDEN), random(INNER, HIDDEN)
    norm[[3, 40]] = 0.0  # channels that are never active
    keys[:, 7] = 0.0  # a channel without weights
    keys[5] = 0.0  # a row of zeros
    gate[2, :32] = 0.125  # constant groups
    gate[3, 32:] = -0.125
    up[4] = up[4].abs()  # groups on one side of zero
    up[6] = 0.0  # an inner channel that is never active: down reads a zero there
    values[9] = 0.0  # the same for o
    return {
        "model.layers.0.input_layernorm.weight": norm,
        "model.layers.1.post_attention_layernorm.weight": norm.clone(),
        "model.layers.0.self_attn.k_proj.weight": keys,
        "model.layers.0.self_attn.v_proj.weight": values,
        "model.layers.0.mlp.gate_proj.weight": gate,
        "model.layers.1.mlp.up_proj.weight": up,
        "model.layers.1.self_attn.q_proj.weight": torch.zeros(64, HIDDEN),  # all of it
        "model.layers.1.mlp.down_proj.weight": torch.zeros(HIDDEN, INNER),
    }


@pytest.mark.parametrize("way", WAYS)
def test_dead_channels_constant_groups_and_zeros_have_a_finite_and_near_result(tmp_path, way):
    replace = edge_weights()
    build = a_build(tmp_path, replace=replace)
    artifact = build.artifact(WAYS[way], "kv8")
    quantized = load_file(build.root / "quantize-w4a16/weights.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in quantized.values() if tensor.is_floating_point())

    def dense(module):
        return unpack_int4(*(quantized[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales"))).float()

    for module in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert not dense(module).any(), module  # zeros stay zeros
    assert not dense("model.layers.0.self_attn.k_proj")[5].any()
    batch = packed([load_file(build.root / "calibrate/blocks.safetensors")["tokens"][0].tolist()])
    wanted = load_checkpoint(tmp_path / "model")(batch, None)
    found = load_workspace(artifact, device="cpu", dtype=torch.float32)(batch, None)
    assert bool(found.isfinite().all())
    assert float((found - wanted).norm() / wanted.norm()) < (0.6 if way == "search=none" else 0.4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, name, value):
    whole = Checkpoint(write_tiny_checkpoint(tmp_path / "whole")).tensor(name).clone()
    whole.view(-1)[5] = value
    build = a_build(tmp_path, replace={name: whole})
    with pytest.raises(ValueError, match=rf"{name} of .*model has NaN or Inf values: the checkpoint is damaged"):
        build.quantize(WAYS["int4 head"], build.calibrate())
    assert sorted(path.name for path in build.root.iterdir()) == (["calibrate"] if name == "lm_head.weight" else [])


def test_activations_that_are_not_finite_are_named_by_layer_and_sample(tmp_path):
    """A checkpoint whose embedding is damaged where only some of the text reads it."""
    text = TEXT[:600] + "zebra quiz " * 40 + TEXT
    embedding = Checkpoint(write_tiny_checkpoint(tmp_path / "whole")).tensor("model.embed_tokens.weight").clone()
    first = {"sampling": "first", "samples": 20}
    blocks = load_file(a_build(tmp_path, text=text).calibrate(**first) / "blocks.safetensors")["tokens"].tolist()
    seen = set(blocks[0])
    sample = next(number for number, block in enumerate(blocks) if set(block) - seen or seen.update(block))
    embedding[next(token for token in blocks[sample] if token not in seen), 3] = float("inf")
    (tmp_path / "other").mkdir()
    damaged = a_build(tmp_path / "other", text=text, replace={"model.embed_tokens.weight": embedding})
    expected = rf"Layer 0: the input of self_attn\..* has NaN or Inf values in calibration sample {sample}\."
    with pytest.raises(ValueError, match=expected):
        damaged.calibrate(**first)
    assert sample > 0 and list(damaged.root.iterdir()) == []


@pytest.mark.parametrize("way", ["awq", "gptq", "awq+gptq", "symmetric"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_stop_being_finite_while_weights_are_quantized_are_named(tmp_path, way, value):
    """The walk measures inputs by their Gram matrices alone."""
    build = a_build(tmp_path)
    calibrated = build.calibrate()
    token = int(load_file(calibrated / "blocks.safetensors")["tokens"][0, 4])
    embedding = Checkpoint(tmp_path / "model").tensor("model.embed_tokens.weight").clone()
    embedding[token, 3] = value
    (tmp_path / "other").mkdir()
    damaged = a_build(tmp_path / "other", replace={"model.embed_tokens.weight": embedding})
    with pytest.raises(ValueError, match=r"Layer 0: the input of self_attn\..* NaN or Inf .* calibration sample 0\."):
        damaged.quantize(WAYS[way], calibrated)
    assert list(damaged.root.iterdir()) == []


@pytest.mark.parametrize("way", ["search=none", "awq", "gptq", "symmetric", "int4 head"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_few_tokens_are_data(tmp_path, way, tokens):
    """Gram matrices of rank 1 and 3: everything is finite, and the same again."""
    build = a_build(tmp_path)
    data = {"samples": 1, "sequence_length": tokens}
    first = bytes_of(build.quantize(WAYS[way], build.calibrate(**data)))
    again = bytes_of(build.quantize(WAYS[way], build.calibrate(**data)))
    assert first == again
    tensors = load_file(build.root / "quantize-w4a16/weights.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize("way", ["search=none", "awq", "gptq", "awq+gptq"])
def test_one_token_over_and_over_is_data(tmp_path, way):
    build = a_build(tmp_path, text="cat" * 4000)
    calibrated = build.calibrate()
    assert len(set(load_file(calibrated / "blocks.safetensors")["tokens"].flatten().tolist())) <= 3
    tensors = load_file(build.quantize(WAYS[way], calibrated) / "weights.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("cat", {"samples": 1, "sequence_length": 32}, r"The calibration text has \d tokens: 0 blocks .* Lower"),
        (TEXT, {"samples": 10_000}, r"tokens: \d+ blocks of .*sequence_length=32, but .*samples=10000"),
        (" \n", {}, "holds no text at all"),
        (TEXT, {"sequence_length": 65}, "sequence_length=65 is longer than the 64 positions"),
    ],
)
def test_data_that_is_not_enough_says_what_would_be(tmp_path, text, changes, message):
    build = a_build(tmp_path, text=text)
    with pytest.raises(ValueError, match=message):
        build.calibrate(**changes)
    assert not build.root.exists()
