import pytest
import torch
from safetensors.torch import load_file

from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import DecoderLayer
from engine.models.rope import rope_tables
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.observers import Observer, gram
from pipelines.quant.stream import side_by_side
from pipelines.quant.w4a16 import layer as layers
from pipelines.quant.w4a16.pack import pack_nibbles
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


def searched(checkpoint, hidden):
    seen = Observer(of_input=gram, of_kv=None)
    run(checkpoint.config, checkpoint.layer(0), hidden, seen)
    with side_by_side(1) as workers:
        return layers.quantize_by_search(
            checkpoint.layer(0),
            seen.seen,
            checkpoint.config,
            group_size=32,
            exponents=[(0.6, 0.5), (0.3, 0.0)],
            workers=workers,
        )


class Unrounded:
    def __init__(self, weight):
        self.weight = weight

    def dequantize(self):
        return self.weight


def test_scaling_alone_changes_nothing(tiny, monkeypatch):
    """Scales, those of V under grouped-query attention and those of rounded norms too, cancel exactly."""
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
    monkeypatch.setattr(layers, "quantize_groups", lambda weight, group_size: Unrounded(weight))
    monkeypatch.setattr(layers.awq, "output_error", lambda weights, scale, *_: -float(scale.std()))
    quantized = searched(tiny, hidden)
    chosen = [row["activation_exponent"] for row in quantized.report]
    assert all(chosen) and set(quantized.smoothing) == {"self_attn.v_proj", "mlp.up_proj"}
    expected = run(tiny.config, tiny.layer(0), hidden)
    actual = run(tiny.config, quantized.dense(), hidden)
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()


def test_search_is_never_worse_than_rounding_alone(tiny):
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
    quantized = searched(tiny, hidden)
    assert len(quantized.report) == 4
    assert all(row["error"] <= row["error_unscaled"] for row in quantized.report)
    assert any(row["error"] < 0.9 * row["error_unscaled"] for row in quantized.report)


def test_packed_and_dense_are_the_same_layer(tmp_path):
    tiny = Checkpoint(write_tiny_checkpoint(tmp_path / "model", attention_bias=True))
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    quantized = searched(tiny, hidden)
    assert torch.equal(run(tiny.config, quantized.packed(), hidden), run(tiny.config, quantized.dense(), hidden))
    divided = tiny.layer(0)["self_attn.v_proj.bias"] / quantized.smoothing["self_attn.v_proj"]
    assert torch.equal(quantized.tensors["self_attn.v_proj.bias"], divided.half())


def test_the_formula_leaves_grouped_values_alone(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    absmax = {m: torch.ones(names.linear_shape(checkpoint.config, m)[1]) for m in names.LINEARS}
    quantized = layers.quantize_as_reference(checkpoint.layer(0), absmax, checkpoint.config, group_size=32, alpha=0.5)
    assert set(quantized.smoothing) == {"mlp.up_proj"}
    assert [row["skipped"] for row in quantized.report if "skipped" in row] == ["grouped-query attention"]
