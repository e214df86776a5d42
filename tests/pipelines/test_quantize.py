import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.storage.checkpoint import Checkpoint, load_checkpoint
from pipelines.quant.tensor_file import tensors_over
from tests.pipelines.stage import FORMULA, FP16, W4A16, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")


def test_fp16_passes_on_the_source_alone(build, tmp_path):
    out = build.quantize(FP16, build.calibrate())
    assert set(bytes_of(out)) == {"source.json"}
    content = json.loads((out / "source.json").read_text())
    assert content["source"] == f"sha256:{build.model['digest']}"
    digest = hashlib.sha256((tmp_path / "model/model.safetensors").read_bytes()).hexdigest()
    assert content["files"]["model.safetensors"] == digest
    assert set(content["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("weights", [W4A16, FORMULA], ids=["grid", "none"])
def test_the_quantized_model_is_near_the_source(build, tmp_path, weights):
    out = build.quantize(weights, build.calibrate())
    checkpoint = Checkpoint(tmp_path / "model")
    held = load_file(out / "weights.safetensors")
    assert held["model.layers.1.mlp.down_proj.qweight"].shape == (96, 8)
    quantized = Decoder(checkpoint.config, _Over(checkpoint, out), device="cpu", dtype=torch.float32)
    batch = packed([list(range(3, 40))])
    expected, actual = load_checkpoint(checkpoint.folder)(batch, None), quantized(batch, None)
    # A random model magnifies rounding; two unrelated ones are 1.4 apart.
    assert 0.05 < ((actual - expected).norm() / expected.norm()).item() < 0.7


class _Over(dict):
    def __init__(self, checkpoint, folder):
        read = tensors_over(folder / "weights.safetensors", checkpoint.tensor)
        quantized = load_file(folder / "weights.safetensors")
        outer = [name for name in checkpoint.names() if ".layers." not in name]
        super().__init__({name: read(name) for name in [*quantized, *outer]})


def test_two_runs_give_equal_bytes(build):
    calibrated = build.calibrate()
    first, again = (bytes_of(build.quantize(W4A16, calibrated)) for _ in range(2))
    assert first == again
    assert set(first) == {"report.json", "smoothing.safetensors", "source.json", "weights.safetensors"}


def test_the_report_has_a_row_per_layer_and_pair(build):
    report = json.loads((build.quantize(W4A16, build.calibrate()) / "report.json").read_text())
    assert report["weights"] == W4A16 and len(report["pairs"]) == 8
    assert all(0 < row["error"] <= row["error_unscaled"] < 1 for row in report["pairs"])
    assert [row["layer"] for row in report["pairs"]] == [0] * 4 + [1] * 4


def errors_before_scaling(build, **changes):
    report = json.loads((build.quantize(W4A16 | changes, build.calibrate()) / "report.json").read_text())
    return [row["error_unscaled"] for row in report["pairs"]]


def test_a_layer_sees_the_quantized_ones_before_it(build):
    """How layer 0 was quantized changes the inputs of layer 1, and so the errors there before any scaling."""
    # Of the first pair alone: the other three of the layer see what was made of those before them.
    scaled, plain = (
        errors_before_scaling(build),
        errors_before_scaling(build, activation_exponents=[0.0], weight_exponents=[0.0]),
    )
    assert scaled[0] == plain[0]
    assert all(one != other for one, other in zip(scaled[4:], plain[4:], strict=True))


@pytest.mark.parametrize("search", [W4A16, FORMULA], ids=["grid", "none"])
def test_a_group_size_that_does_not_fit_is_refused_before_work(build, search):
    calibrated = build.calibrate()
    problem = r"group_size 64 does not divide the 96 input features of model.layers.*mlp.down_proj.*: 16, 32;"
    with pytest.raises(ValueError, match=problem):
        build.quantize(search | {"group_size": 64}, calibrated)
    assert not (build.root / "quantize-w4a16").exists()


def test_an_unknown_recipe(build):
    with pytest.raises(ValueError, match="weights=w2a2 is no recipe; there are fp16, w8a8, w4a16"):
        build.quantize({"name": "w2a2"}, build.root)
