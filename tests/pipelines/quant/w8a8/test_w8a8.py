"""The recipe as a stage: near the source, the same bytes each time, and named errors for what cannot be quantized."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Recipe
from engine.kernels import reference as ops
from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.storage.artifacts import read_manifest
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from engine.storage.kv_scale_files import rank_file
from engine.storage.reshard import reshard_artifact
from engine.storage.workspace import WEIGHTS, Workspace, load_workspace
from pipelines.quant.kv import layer_scales
from pipelines.quant.tensor_file import tensors_over
from tests.pipelines.stage import Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

W8A8 = {"name": "w8a8", "search": "grid", "alphas": [0.4, 0.6]}
ROTATED = {**W8A8, "rotate_down": 8}
FORMULA = {"name": "w8a8", "search": "none", "alpha": 0.5}


@pytest.fixture
def build(tmp_path, monkeypatch):
    return make(tmp_path, monkeypatch)


def make(tmp_path, monkeypatch, **changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model", **changes), tmp_path / "text.txt")


def logits(checkpoint, folder, rotated=0):
    read = tensors_over(folder / "weights.safetensors", checkpoint.tensor)
    outer = [name for name in checkpoint.names() if ".layers." not in name]
    weights = {name: read(name) for name in [*load_file(folder / "weights.safetensors"), *outer]}
    config = replace(checkpoint.config, rotate_down=rotated)
    return Decoder(config, weights, device="cpu", dtype=torch.float32)(packed([list(range(3, 40))]), None)


@pytest.mark.parametrize("weights", [W8A8, ROTATED, FORMULA], ids=["grid", "rotated", "none"])
def test_the_quantized_model_is_near_the_source(build, tmp_path, weights):
    out = build.quantize(weights, build.calibrate())
    assert set(bytes_of(out)) == {"report.json", "smoothing.safetensors", "source.json", "weights.safetensors"}
    held = load_file(out / "weights.safetensors")
    assert held["model.layers.1.mlp.down_proj.weight"].dtype == torch.int8
    assert held["model.layers.1.mlp.down_proj.weight_scale"].shape == (64,)
    checkpoint = Checkpoint(tmp_path / "model")
    expected = load_checkpoint(checkpoint.folder)(packed([list(range(3, 40))]), None)
    actual = logits(checkpoint, out, weights.get("rotate_down", 0))
    # A random model magnifies rounding; two unrelated ones are 1.4 apart.
    assert 0.002 < ((actual - expected).norm() / expected.norm()).item() < 0.1
    report = json.loads((out / "report.json").read_text())
    assert report["weights"] == weights and [row["layer"] for row in report["pairs"]] == [0] * 4 + [1] * 4


def test_two_runs_give_equal_bytes_and_threads_change_nothing(build):
    calibrated = build.calibrate()
    for weights in (W8A8, ROTATED):
        first, again = (bytes_of(build.quantize(weights, calibrated)) for _ in range(2))
        assert first == again


def test_the_artifact_computes_what_was_quantized_and_its_value_scales_are_smoothed(build, tmp_path):
    calibrated = build.calibrate()
    quantized = build.quantize(W8A8, calibrated)
    inputs = {"shard": build.shard(W8A8, quantized, tp=2), "quantize": quantized, "calibrate": calibrated}
    folder = build.export(W8A8, "kv8", tp=2, **inputs)
    workspace = Workspace(folder)
    assert str(workspace.recipe) == "w8a8-kv8" and workspace.ini.weight_type == "int8"
    out = load_workspace(folder, device="cpu", dtype=torch.float32)(packed([list(range(3, 40))]), None)
    assert torch.equal(out, logits(Checkpoint(tmp_path / "model"), quantized))
    smoothing = load_file(quantized / "smoothing.safetensors")
    statistics = load_file(calibrated / "stats.safetensors")
    for rank, row in enumerate(
        layer_scales(statistics, 1, tp=2, smoothing=smoothing["model.layers.1.self_attn.v_proj"])
    ):
        stored = torch.frombuffer(bytearray((folder / WEIGHTS / rank_file(1, rank)).read_bytes()), dtype=torch.float32)
        assert torch.equal(stored, torch.tensor(row))
        assert not torch.equal(stored, torch.tensor(layer_scales(statistics, 1, tp=2)[rank]))


def test_the_artifact_says_that_it_is_rotated_and_any_number_of_ranks_computes_it(build, tmp_path):
    calibrated = build.calibrate()
    quantized = build.quantize(ROTATED, calibrated)
    inputs = {"shard": build.shard(ROTATED, quantized, tp=2), "quantize": quantized, "calibrate": calibrated}
    folder = build.export(ROTATED, "kv16", tp=2, **inputs)
    assert Workspace(folder).recipe == Recipe(weights="w8a8", rotate_down=8) == read_manifest(folder).recipe
    reshard_artifact(folder, tmp_path / "one", 1)
    expected = logits(Checkpoint(tmp_path / "model"), quantized, 8)
    for artifact in (folder, tmp_path / "one"):
        out = load_workspace(artifact, device="cpu", dtype=torch.float32)(packed([list(range(3, 40))]), None)
        assert torch.equal(out, expected)
        assert read_manifest(artifact).recipe.rotate_down == 8


def test_bfloat16_beside_int8_is_kept(tmp_path, monkeypatch):
    build = make(tmp_path, monkeypatch, dtype=torch.bfloat16, torch_dtype="bfloat16")
    folder = build.artifact(W8A8, "kv16")
    workspace = Workspace(folder)
    assert workspace.config.dtype == "bfloat16"
    checkpoint = Checkpoint(tmp_path / "model")
    assert torch.equal(workspace.tensor(names.EMBEDDING), checkpoint.tensor(names.EMBEDDING))
    batch = packed([list(range(3, 40))])
    expected = load_checkpoint(checkpoint.folder)(batch, None)
    actual = load_workspace(folder, device="cpu", dtype=torch.float32)(batch, None)
    assert 0.002 < ((actual - expected).norm() / expected.norm()).item() < 0.1


@pytest.mark.parametrize("weights", [W8A8, FORMULA], ids=["grid", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(build, tmp_path, weights, value):
    calibrated = build.calibrate()
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    spoiled = Build(tmp_path / "spoiled", tmp_path / "model", tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of .* has NaN or Inf values"):
        spoiled.quantize(weights, calibrated)
    assert not (tmp_path / "spoiled/quantize-w8a8").exists()


def test_activations_that_overflow_are_named(build, tmp_path):
    calibrated = build.calibrate()
    tensors = {name: tensor.float() for name, tensor in load_file(tmp_path / "model/model.safetensors").items()}
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    spoiled = Build(tmp_path / "spoiled", tmp_path / "model", tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"Layer 0: the input of mlp\.down_proj has NaN or Inf values in calibration"):
        spoiled.quantize(W8A8, calibrated)


@pytest.mark.parametrize("length", [1, 2])
def test_data_of_one_token_a_block_is_enough(build, length):
    calibrated = build.calibrate()
    blocks = load_file(calibrated / "blocks.safetensors")["tokens"]
    save_file({"tokens": blocks[:1, :length].contiguous()}, calibrated / "blocks.safetensors")
    out = build.quantize(W8A8, calibrated)
    held = load_file(out / "weights.safetensors")
    assert all(bool(tensor.float().isfinite().all()) for tensor in held.values())


def test_a_layer_is_what_its_rows_say(build, tmp_path):
    """The codes are the nearest ones of the smoothed weight, whose scale the norm in the same file was divided by."""
    out = build.quantize(W8A8, build.calibrate())
    held, checkpoint = load_file(out / "weights.safetensors"), Checkpoint(tmp_path / "model")
    norm = "model.layers.0.input_layernorm.weight"
    scale = checkpoint.tensor(norm).float() / held[norm].float()
    weight = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").float() * scale
    codes, scales = ops.quantize_rows(weight)
    assert torch.equal(codes, held["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(scales, held["model.layers.0.self_attn.q_proj.weight_scale"])
