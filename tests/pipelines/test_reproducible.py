"""The same slice gives the same bytes: in another process and folder, with another number of threads."""

import json

import pytest

from pipelines.slices import write_json
from tests.pipelines.forked_stage import run_forked
from tests.pipelines.stage import CALIBRATION, FORMULA, W4A16, W8A8, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

RECIPES = {
    "awq-gptq": W4A16,
    "gptq": {key: value for key, value in W4A16.items() if "exponents" not in key} | {"method": "gptq"},
    "awq": {key: value for key, value in W4A16.items() if key != "correction"} | {"method": "awq"},
    "symmetric": W4A16 | {"symmetric": True},
    "formula": FORMULA,
    "int4-head": W4A16 | {"head": "int4"},
    "w8a8": W8A8,
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")


def test_calibrate_and_quantize_give_the_same_bytes_with_one_and_two_threads_in_other_folders(build, tmp_path):
    requests = []
    for threads in (1, 2):
        folder = tmp_path / f"elsewhere-{threads}"
        write_json(folder / "build/paths.json", json.loads((tmp_path / "build/paths.json").read_text()))
        content = {"model": build.model, "calibration": {"text": build.text, **CALIBRATION}}
        write_json(folder / "calibrate.json", content)
        common = {"folder": str(folder), "threads": threads}
        argv = ["--slice", "calibrate.json", "--out", "calibrated"]
        requests.append({"stage": "pipelines.calibrate", "argv": argv, **common})
        for name, weights in RECIPES.items():
            write_json(folder / f"{name}.json", {"model": build.model, "weights": weights})
            argv = ["--slice", f"{name}.json", "--out", name, "--in", "calibrate=calibrated"]
            requests.append({"stage": "pipelines.quantize", "argv": argv, **common})
    run_forked(*requests)
    one, two = (tmp_path / f"elsewhere-{threads}" for threads in (1, 2))
    calibrated = build.calibrate()
    assert bytes_of(one / "calibrated") == bytes_of(two / "calibrated") == bytes_of(calibrated)
    for name, weights in RECIPES.items():
        assert bytes_of(one / name) == bytes_of(two / name) == bytes_of(build.quantize(weights, calibrated)), name
