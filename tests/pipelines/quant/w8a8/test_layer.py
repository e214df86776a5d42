"""SmoothQuant of one layer: the reference's bytes, scales that cancel, a search that never loses, dead inputs."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from engine.kernels.rotation import rotate
from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import DecoderLayer
from engine.models.rope import rope_tables
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.observers import Observer, some_rows
from pipelines.quant.stream import side_by_side
from pipelines.quant.w8a8 import layer as layers
from pipelines.quant.w8a8.layer import RowCodes
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint
from tests.shared_data import shared

ALPHAS = [0.3, 0.5, 0.7]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_reference_formula_gives_the_reference_bytes(layer):
    golden = shared("golden/turbomind-v0.1.0/llama_mha")
    checkpoint = Checkpoint(golden / "checkpoint")
    expected = load_file(golden / "expected.w8a8_checkpoint.safetensors")
    statistics = load_file(golden / "calibration_stats.safetensors")
    absmax = {m: statistics[f"inputs/absmax/{names.layer_name(layer, m)}"] for m in names.LINEARS}
    done = layers.quantize_as_reference(
        checkpoint.layer(layer), absmax, checkpoint.config, alpha=0.5, dtype=torch.float16
    )
    for module in names.LINEARS:
        name = names.layer_name(layer, module)
        assert torch.equal(done.packed()[f"{module}.weight"], expected[f"{name}.weight"])
        assert torch.equal(done.packed()[f"{module}.weight_scale"], expected[f"{name}.scale"][:, 0])
    for norm in names.NORMS:
        assert torch.equal(done.tensors[f"{norm}.weight"], expected[f"{names.layer_name(layer, norm)}.weight"])


@pytest.fixture(params=[2, 4], ids=["grouped", "multi-head"])
def tiny(request, tmp_path):
    return Checkpoint(write_tiny_checkpoint(tmp_path / "model", num_key_value_heads=request.param))


def outliers(tokens=48):
    """Hidden states of which a few channels are far larger than the others, as large models have them."""
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    hidden[:, [5, 40]] *= 60
    return hidden


def run(config, tensors, hidden, observe=None):
    batch = packed([list(range(len(hidden)))])
    layer = DecoderLayer(config, tensors, device="cpu", dtype=torch.float32)
    return layer(hidden, batch, None, rope_tables(config, batch), observe)


def searched(checkpoint, hidden, alphas=ALPHAS, tensors=None, rotated=0):
    tensors = checkpoint.layer(0) if tensors is None else tensors
    observer = Observer(of_input=lambda x: some_rows(x, 32), of_kv=None)
    run(checkpoint.config, tensors, hidden, observer)
    with side_by_side(2) as workers:
        return layers.quantize_by_search(
            tensors,
            observer.seen,
            checkpoint.config,
            alphas=alphas,
            dtype=torch.float16,
            workers=workers,
            rotated=rotated,
        )


def dense(done):
    weights = {f"{module}.weight": codes.dequantize() for module, codes in done.codes.items()}
    return weights | {name: tensor.float() for name, tensor in done.tensors.items()}


def test_scaling_alone_changes_nothing(tiny, monkeypatch):
    """Scales, those of V under grouped-query attention and those of rounded norms too, cancel exactly."""

    class Unrounded(RowCodes):
        @classmethod
        def of(cls, weight):
            return cls(codes=weight, scales=torch.ones(len(weight)))

        def divided(self, divisor):
            return Unrounded(codes=self.codes, scales=self.scales / divisor)

    monkeypatch.setattr(layers, "RowCodes", Unrounded)
    monkeypatch.setattr(layers, "_best", lambda weights, rows, tried, workers, block: (*tried[-1], [0.0]))
    hidden = outliers()
    done = searched(tiny, hidden)
    assert [row["alpha"] for row in done.report] == [0.7] * 4
    assert set(done.smoothing) == {"self_attn.v_proj", "mlp.up_proj"}
    expected = run(tiny.config, tiny.layer(0), hidden)
    assert (run(tiny.config, dense(done), hidden) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_smoothing_helps_where_channels_differ_and_never_hurts(tiny):
    done = searched(tiny, outliers())
    assert [row["pair"].split(" ")[0] for row in done.report] == [
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.v_proj",
        "mlp.up_proj",
    ]
    assert all(0 < row["error"] <= row["error_unsmoothed"] for row in done.report)
    assert done.report[0]["error"] < 0.5 * done.report[0]["error_unsmoothed"]
    hidden = outliers()
    expected = run(tiny.config, tiny.layer(0), hidden)
    errors = {}
    for name, alphas in (("smoothed", ALPHAS), ("plain", [])):
        out = run(tiny.config, searched(tiny, hidden, alphas).packed(), hidden)
        errors[name] = float((out - expected).norm() / (expected - hidden).norm())
    assert errors["smoothed"] < 0.8 * errors["plain"] < 0.1


def test_down_is_judged_and_stored_for_rotated_inputs(tiny):
    """Its codes are the nearest of the smoothed weight times the matrix, its errors those of what will run, and nothing
    but down_proj, and up_proj by its own alpha, differs."""
    hidden = outliers()
    plain, done = searched(tiny, hidden), searched(tiny, hidden, rotated=8)
    same = [module for module in names.LINEARS if module not in ("mlp.up_proj", names.DOWN)]
    assert all(torch.equal(plain.codes[module].codes, done.codes[module].codes) for module in same)
    assert plain.report[:3] == done.report[:3]
    weight = tiny.layer(0)["mlp.down_proj.weight"].double() * done.smoothing["mlp.up_proj"]
    expected = RowCodes.of(rotate(weight, 8).float())
    assert torch.equal(done.codes[names.DOWN].codes, expected.codes)
    assert torch.equal(done.codes[names.DOWN].scales, expected.scales)
    config = dataclasses.replace(tiny.config, rotate_down=8)
    wanted = run(tiny.config, tiny.layer(0), hidden)
    assert float((run(config, done.packed(), hidden) - wanted).norm() / (wanted - hidden).norm()) < 0.1
    assert float((run(tiny.config, done.packed(), hidden) - wanted).norm() / (wanted - hidden).norm()) > 0.1


def test_no_smoothing_is_kept_where_every_other_is_worse():
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(8, 16, generator=generator), torch.randn(20, 16, generator=generator)
    bad = torch.ones(16)
    bad[3] = 1e3
    with side_by_side(1) as workers:
        alpha, scale, errors = layers._best([weight], rows, [(None, torch.ones(16)), (0.5, bad)], workers)
    assert alpha is None and torch.equal(scale, torch.ones(16)) and errors[1] > 100 * errors[0]


def test_v_is_divided_with_its_bias_and_its_codes_are_those_of_the_divided_weight(tmp_path):
    tiny = Checkpoint(write_tiny_checkpoint(tmp_path / "model", attention_bias=True))
    done = searched(tiny, outliers())
    divisor = done.smoothing["self_attn.v_proj"]
    assert not torch.equal(divisor, torch.ones_like(divisor))
    bias = tiny.layer(0)["self_attn.v_proj.bias"].float()
    assert torch.equal(done.tensors["self_attn.v_proj.bias"], (bias / divisor).half())
    codes = done.codes["self_attn.v_proj"]
    whole = RowCodes.of(codes.dequantize())
    assert (whole.codes.int() - codes.codes).abs().max() <= 1 and torch.allclose(whole.scales, codes.scales)


def test_the_formula_leaves_grouped_values_alone(tmp_path):
    checkpoint = Checkpoint(write_tiny_checkpoint(tmp_path / "model"))
    absmax = {m: torch.ones(names.linear_shape(checkpoint.config, m)[1]) for m in names.LINEARS}
    done = layers.quantize_as_reference(checkpoint.layer(0), absmax, checkpoint.config, alpha=0.5, dtype=torch.float16)
    assert set(done.smoothing) == {"mlp.up_proj"}
    assert [row["skipped"] for row in done.report if "skipped" in row] == ["grouped-query attention"]


def test_dead_channels_and_rows_of_zeros_have_a_defined_result(tiny):
    """A channel that no token uses, one that the norm closes, an output without weights, inputs of zeros alone."""
    tensors = {name: tensor.clone() for name, tensor in tiny.layer(0).items()}
    tensors["input_layernorm.weight"][7] = 0
    tensors["mlp.gate_proj.weight"][3] = 0
    tensors["self_attn.k_proj.weight"][:, 9] = 0
    hidden = outliers()
    hidden[:, 11] = 0
    absmax = {m: torch.ones(names.linear_shape(tiny.config, m)[1]) for m in names.LINEARS}
    for module in names.QKV:
        absmax[module][[7, 11]] = 0
    by_formula = layers.quantize_as_reference(tensors, absmax, tiny.config, alpha=0.5, dtype=torch.float16)
    for done in (searched(tiny, hidden, tensors=tensors), by_formula):
        assert all(bool(tensor.isfinite().all()) for tensor in dense(done).values())
        assert not done.codes["mlp.gate_proj"].codes[3].any() and done.tensors["input_layernorm.weight"][7] == 0
        assert all(bool((codes.scales > 0).all()) for codes in done.codes.values())
        assert bool(run(tiny.config, done.packed(), hidden).isfinite().all())
    silent = searched(tiny, torch.zeros(48, 64), tensors=tensors)
    assert [row["alpha"] for row in silent.report] == [None] * 4
    assert all(row["error"] == row["error_unsmoothed"] == 0 for row in silent.report)
    assert not run(tiny.config, silent.packed(), torch.zeros(48, 64)).any()


@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 100])
def test_rows_are_taken_at_equal_distances_and_not_from_the_start(tokens):
    x = torch.arange(float(tokens * 2)).view(tokens, 2)
    seen = some_rows(x, 8)
    count = min(tokens, 8)
    assert len(seen["rows"]) == count == len(seen["rows"].unique(dim=0))
    assert torch.equal(seen["absmax"], x.amax(dim=0))
    if tokens > 16:
        assert not (seen["rows"] == x[0]).all(dim=1).any()
        gaps = seen["rows"][1:, 0] - seen["rows"][:-1, 0]
        assert gaps.max() - gaps.min() <= 2
