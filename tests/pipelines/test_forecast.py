"""What a stage says before and after its work, and what it refuses to begin."""

import json

import pytest

from engine.models.families import model_config
from pipelines import forecast, machine
from pipelines.forecast import check_fits, load_of
from pipelines.quant.cost import Load, calibration_cost, quantization_cost
from pipelines.recipe_fields import weights_part
from pipelines.schema import Weights
from pipelines.slices import Call
from tests.pipelines.stage import FP16, W4A16, Build, bytes_of
from tests.pipelines.tiny_checkpoint import CONFIG, TEXT, write_tiny_checkpoint

MODEL = model_config(CONFIG | {"vocab_size": 300, "hidden_size": 1024, "intermediate_size": 2816})
LOAD = Load(samples=64, length=512, workers=2)
SEARCH = weights_part(Weights(name="w4a16"))


def quantization(load, weights):
    return quantization_cost(MODEL, weights, load)


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")


def test_stages_say_what_they_will_take_and_what_they_took(build, capsys):
    calibrated = build.calibrate()
    build.quantize(W4A16, calibrated)
    said = capsys.readouterr().err
    for stage in ("calibrate calibrate", "quantize quantize-w4a16"):
        assert f"{stage}: forecast\n  memory  " in said and f"{stage}: took " in said
    assert said.count("until it is done") == 2
    build.quantize(FP16, calibrated)
    assert capsys.readouterr().err == ""


def test_figures_are_kept_beside_the_outputs_and_never_in_them(build, tmp_path):
    calibrated = build.calibrate()
    first, again = (bytes_of(build.quantize(W4A16, calibrated)) for _ in range(2))
    assert first == again
    call = Call(slice={}, out=tmp_path / "build/quantize/m-c-w4a16", inputs={})
    with forecast.forecast(call, "quantize", LOAD, quantization, SEARCH):
        taken = bytearray(80_000_000)
        taken[::4096] = b"x" * len(taken[::4096])
    record = json.loads((tmp_path / "build/runs/quantize/m-c-w4a16.json").read_text())
    assert 60e6 < record["measured"]["memory"] < 200e6 and record["measured"]["seconds"] > 0
    assert sum(record["forecast"]["memory"].values()) == quantization(LOAD, SEARCH).peak
    assert record["load"]["samples"] == 64 and not call.out.exists()


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
def test_what_does_not_fit_is_refused_before_work_with_the_knobs_that_would_do(build, monkeypatch, stage):
    calibrated = build.calibrate() if stage == "quantize" else None
    needed = {
        "calibrate": calibration_cost(_model(build), load_of(_model(build), 2, 32, "cpu")).peak,
        "quantize": quantization_cost(_model(build), W4A16, load_of(_model(build), 3, 32, "cpu")).peak,
    }
    monkeypatch.setattr(forecast, "free_memory", lambda device: needed[stage] + forecast.SPARE_BYTES)
    before = sorted(build.root.rglob("*"))
    with pytest.raises(ValueError, match=rf"^{stage} .* needs about .* Nothing was computed") as error:
        build.calibrate() if calibrated is None else build.quantize(W4A16, calibrated)
    assert f"What fits: calibration.samples={2 if stage == 'calibrate' else 3}" in str(error.value)
    assert sorted(build.root.rglob("*")) == before


def _model(build):
    from engine.storage.checkpoint import Checkpoint

    return Checkpoint(build.root.parent / "model").config


def refused(free, load=LOAD, weights=SEARCH):
    with pytest.raises(ValueError) as error:
        check_fits("quantize k", load, quantization, weights, device="cpu", free=free)
    return str(error.value)


def test_every_way_that_is_proposed_fits_and_the_next_larger_does_not():
    whole = quantization(LOAD, SEARCH).peak
    check_fits("quantize k", LOAD, quantization, SEARCH, device="cpu", free=whole + forecast.SPARE_BYTES)
    free = int(whole * 0.85) + forecast.SPARE_BYTES
    said = refused(free)
    for name, field in (("samples", "samples"), ("sequence_length", "length")):
        value = int(said.partition(f"calibration.{name}=")[2].split()[0].strip(".,"))
        values = {"samples": 64, "length": 512, "workers": 2}
        assert quantization(Load(**values | {field: value}), SEARCH).peak + forecast.SPARE_BYTES <= free
        assert quantization(Load(**values | {field: value + 1}), SEARCH).peak + forecast.SPARE_BYTES > free
    assert "weights.correction=0.0" in said and "weights.method=rtn" in said


def test_a_model_that_is_too_large_itself_is_said():
    assert "it needs a machine with more memory" in refused(50_000_000)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    call = Call(slice={}, out=tmp_path / "out", inputs={})
    with (
        pytest.raises(ValueError, match=r"writes .*, and keeps .* more while it runs; 1.0 kB are free"),
        forecast.forecast(call, "quantize", LOAD, quantization, SEARCH),
    ):
        raise AssertionError("it was begun")


@pytest.mark.parametrize("free", [0.5, 2.0])
def test_a_control_group_with_a_limit_counts(tmp_path, free):
    limit = int(free * 1e9)
    inner = tmp_path / "cgroup/a/b"
    inner.mkdir(parents=True)
    for folder, most in ((inner, "max"), (inner.parent, str(limit))):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("300000000\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 100000000\n")
    (tmp_path / "membership").write_text("0::/a/b\n")
    assert list(machine._group_limits(tmp_path / "cgroup", tmp_path / "membership")) == [limit - 200_000_000]


def test_the_forecast_follows_what_is_asked_for():
    peak = quantization(LOAD, SEARCH).peak
    for less in ({"correction": 0.0}, {"method": "rtn"}):
        assert quantization(LOAD, SEARCH | less).peak < peak
    more = quantization(Load(samples=128, length=512, workers=2), SEARCH)
    assert more.peak > peak and more.operations > quantization(LOAD, SEARCH).operations
    assert machine.operations_a_second("cpu", 1) > 1e8
