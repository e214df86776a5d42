from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import DecoderLayer
from engine.models.rope import rope_tables
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.stream import side_by_side
from pipelines.quant.w4a16 import layer as layers
from pipelines.quant.w4a16.pack import pack_nibbles
from pipelines.quant.w4a16.search import Chosen, Method
from pipelines.quant.walk import Walk
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint
from tests.shared_data import shared


@pytest.mark.parametrize("layer", [0, 1])
def test_the_reference_formula_gives_the_reference_bytes(layer):
    golden = shared("golden/turbomind-v0.1.0/llama_mha")
    checkpoint = Checkpoint(golden / "checkpoint")
    expected = load_file(golden / "expected.awq_checkpoint.safetensors")
    statistics = load_file(golden / "calibration_stats.safetensors")
    absmax = {m: statistics[f"inputs/absmax/{names.layer_name(layer, m)}"] for m in names.LINEARS}
    quantized = layers.quantize_as_reference(
        checkpoint.layer(layer), absmax, checkpoint.config, group_size=128, alpha=0.5
    )
    for module, codes in quantized.codes.items():
        name = names.layer_name(layer, module)
        assert torch.equal(pack_nibbles(codes.codes.t()), expected[f"{name}.qweight"])
        assert torch.equal(pack_nibbles(codes.zeros.t()), expected[f"{name}.qzeros"])
        assert torch.equal(codes.scales.t(), expected[f"{name}.scales"])
        assert torch.equal(quantized.packed()[f"{module}.scales"], expected[f"{name}.scales"].half())
    for norm in names.NORMS:
        assert torch.equal(quantized.tensors[f"{norm}.weight"], expected[f"{names.layer_name(layer, norm)}.weight"])


@pytest.fixture(params=[2, 4], ids=["grouped", "multi-head"])
def tiny(request, tmp_path):
    return Checkpoint(write_tiny_checkpoint(tmp_path / "model", num_key_value_heads=request.param))


def run(config, tensors, hidden, observe=None):
    batch = packed([list(range(len(hidden)))])
    layer = DecoderLayer(config, tensors, device="cpu", dtype=torch.float32)
    return layer(hidden, batch, None, rope_tables(config, batch), observe)


METHOD = Method(group_size=32, exponents=((0.6, 0.5), (0.3, 0.0)))


def searched(checkpoint, hidden, method=METHOD):
    """Layer 0 quantized for one sample with these hidden states before it."""
    with side_by_side(1) as workers:
        walk = Walk(checkpoint, torch.zeros(1, len(hidden), dtype=torch.int32), workers, drift=True, device="cpu")
        walk.stream.hidden[0] = walk.unquantized[0] = hidden
        here = walk.layer(0, checkpoint.layer(0))
        return layers.quantize_by_search(checkpoint.layer(0), here.inputs, checkpoint.config, method, workers)


class Unrounded:
    def __init__(self, weight):
        self.weight = weight

    def dequantize(self):
        return self.weight

    def divided(self, divisor):
        return Unrounded(self.weight / divisor.unsqueeze(-1))


def test_scaling_alone_changes_nothing(tiny, monkeypatch):
    """Scales, those of V under grouped-query attention and those of rounded norms too, cancel exactly."""
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)

    def unrounded(weights, seen, candidates, method, workers):
        last = candidates[-1]
        codes = [Unrounded(weight * last.scale) for weight in weights]
        return Chosen(candidate=last, codes=codes, rounded_error=0, unscaled_error=0, error=0)

    monkeypatch.setattr(layers, "quantize_linears", unrounded)
    quantized = searched(tiny, hidden)
    chosen = [row["activation_exponent"] for row in quantized.report]
    assert all(chosen) and set(quantized.smoothing) == {"self_attn.v_proj", "mlp.up_proj"}
    expected = run(tiny.config, tiny.layer(0), hidden)
    actual = run(tiny.config, quantized.dense(), hidden)
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("feedback", [False, True], ids=["awq", "awq+gptq"])
def test_search_is_never_worse_than_no_scaling(tiny, feedback):
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
    quantized = searched(tiny, hidden, replace(METHOD, feedback=feedback))
    assert len(quantized.report) == 4
    assert all(row["error"] <= row["error_unscaled"] <= 1.01 * row["error_rounded"] for row in quantized.report)
    assert any(row["error"] < 0.9 * row["error_unscaled"] for row in quantized.report)


def test_what_was_quantized_before_is_made_up_for(tiny):
    """The layer's outputs are nearer to the unquantized model's where the drift of inputs is corrected."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(400, 64, generator=generator) * torch.logspace(-1, 1, 64)
    drifted = hidden + 0.2 * torch.randn(400, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    expected = run(tiny.config, tiny.layer(0), hidden) - hidden
    errors = {}
    for correction in (0.0, 1.0):
        with side_by_side(1) as workers:
            walk = Walk(tiny, torch.zeros(1, 400, dtype=torch.int32), workers, drift=True, device="cpu")
            walk.stream.hidden[0], walk.unquantized[0] = drifted, hidden
            here = walk.layer(0, tiny.layer(0))
            method = Method(group_size=32, correction=correction)
            done = layers.quantize_by_search(tiny.layer(0), here.inputs, tiny.config, method, workers)
        errors[correction] = float((run(tiny.config, done.dense(), drifted) - drifted - expected).norm())
    assert errors[1.0] < 0.97 * errors[0.0]


def test_rounding_alone_needs_no_text(tiny):
    done = layers.round_layer(tiny.layer(0), group_size=32, symmetric=True)
    weight = tiny.layer(0)["mlp.up_proj.weight"].float()
    assert (done.codes["mlp.up_proj"].zeros == 8).all() and not done.smoothing and not done.report
    assert (done.dense()["mlp.up_proj.weight"] - weight).abs().max() <= 0.51 * done.codes["mlp.up_proj"].scales.max()


def test_packed_and_dense_are_the_same_layer(tmp_path):
    tiny = Checkpoint(write_tiny_checkpoint(tmp_path / "model", attention_bias=True))
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    quantized = searched(tiny, hidden)
    assert torch.equal(run(tiny.config, quantized.packed(), hidden), run(tiny.config, quantized.dense(), hidden))
    divided = tiny.layer(0)["self_attn.v_proj.bias"].float() / quantized.smoothing["self_attn.v_proj"]
    assert torch.equal(quantized.tensors["self_attn.v_proj.bias"], divided.half())


def test_the_formula_leaves_grouped_values_alone(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    absmax = {m: torch.ones(names.linear_shape(checkpoint.config, m)[1]) for m in names.LINEARS}
    quantized = layers.quantize_as_reference(checkpoint.layer(0), absmax, checkpoint.config, group_size=32, alpha=0.5)
    assert set(quantized.smoothing) == {"mlp.up_proj"}
    assert [row["skipped"] for row in quantized.report if "skipped" in row] == ["grouped-query attention"]
