"""A stage that is killed goes on with the next layer, and ends with the bytes of one that was not."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from pipelines import unfinished
from pipelines.slices import Call, write_json
from pipelines.unfinished import run_key, unfinished_work
from tests.pipelines.forked_stage import run_forked
from tests.pipelines.stage import CALIBRATION, FORMULA, W4A16, W8A8, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint

LAYERS = 5
RECIPES = {
    "search": W4A16 | {"head": "int4"},
    "one-stream": W4A16 | {"correction": 0.0},
    "formula": FORMULA,
    "w8a8": W8A8,
}


class Stages:
    """Stages of a small checkpoint, run to their ends in this process, and as commands that are killed."""

    def __init__(self, root):
        os.chdir(root)
        self.root = root
        (root / "text.txt").write_text(TEXT)
        checkpoint = write_tiny_checkpoint(root / "model", num_hidden_layers=LAYERS)
        self.build = Build(root / "whole", checkpoint, root / "text.txt")
        self.calibrated = self.build.calibrate()

    def request(self, name, stage, content, kills, **inputs):
        write_json(Path(f"slices/{name}.json"), content)
        argv = ["--slice", f"slices/{name}.json", "--out", f"{name}/out"]
        argv += [f"--in={key}={path}" for key, path in inputs.items()]
        return {"stage": f"pipelines.{stage}", "argv": argv, "unfinished": f"{name}/.unfinished", "kills": kills}

    def calibration(self, kills):
        content = {"model": self.build.model, "calibration": {"text": self.build.text, **CALIBRATION}}
        return self.request("calibrate", "calibrate", content, kills)

    def quantization(self, name, weights, kills):
        content = {"model": self.build.model, "weights": weights}
        return self.request(name, "quantize", content, kills, calibrate=self.calibrated)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    before = Path.cwd()
    yield Stages(tmp_path_factory.mktemp("killed"))
    os.chdir(before)


def test_stages_that_are_killed_twice_go_on_with_the_next_layer(stages):
    os.chdir(stages.root)
    requests = [stages.calibration([1, 3])]
    requests += [stages.quantization(name, weights, [2, 4]) for name, weights in RECIPES.items()]
    calibrated, *quantized = run_forked(*requests)
    for said, (first, second) in [(calibrated, (1, 3)), *((said, (2, 4)) for said in quantized)]:
        assert "resume: " not in said[0]
        assert f"resume: {first} of {LAYERS} layers were done before" in said[1]
        assert f"resume: {second} of {LAYERS} layers were done before" in said[2]
    assert bytes_of(Path("calibrate/out")) == bytes_of(stages.calibrated)
    for name, weights in RECIPES.items():
        assert bytes_of(Path(name, "out")) == bytes_of(stages.build.quantize(weights, stages.calibrated))
        assert [path.name for path in Path(name).iterdir()] == ["out"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stages_that_are_killed_on_a_gpu_go_on_with_the_next_layer(stages):
    os.chdir(stages.root)
    requests = []
    for name, kills in (("whole", []), ("killed", [1, 3])):
        requests += [
            stages.quantization(f"{name}-{recipe}", RECIPES[recipe], kills) for recipe in ("search", "one-stream")
        ]
        requests[-2]["argv"] += ["--device", "cuda"]
        requests[-1]["argv"] += ["--device", "cuda"]
    said = run_forked(*requests)
    assert all(f"resume: 3 of {LAYERS} layers" in killed[2] for killed in said[2:])
    for recipe in ("search", "one-stream"):
        assert bytes_of(Path(f"killed-{recipe}/out")) == bytes_of(Path(f"whole-{recipe}/out"))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_kills_at_any_time_end_with_the_same_bytes(stages, soak_row):
    os.chdir(stages.root)
    moments = random.Random(7)
    whole = {"calibrate": bytes_of(stages.calibrated)}
    whole["quantize"] = bytes_of(stages.build.quantize(W4A16, stages.calibrated))
    requests = []
    for _ in range(10):
        requests += [stages.quantization("quantize", W4A16, [moments.uniform(0.02, 1.0)])]
        requests += [stages.calibration([moments.uniform(0.02, 0.3)])]
    for request in requests:
        run_forked(request)
        name = request["argv"][3].partition("/")[0]
        soak_row["count"] += 1
        left = [path.name for path in Path(name).iterdir()]
        soak_row["failures"] += bytes_of(Path(name, "out")) != whole[name] or left != ["out"]
    assert soak_row == {"count": 20, "failures": 0}


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibrated").mkdir()
    (tmp_path / "calibrated/stats.safetensors").write_bytes(b"1")
    return Call(slice={"a": 1}, out=tmp_path / "build/out", inputs={"calibrate": tmp_path / "calibrated"})


def test_the_key_is_all_that_decides_about_bits(call):
    def keys():
        other = Call(slice={"a": 2}, out=call.out, inputs=call.inputs)
        elsewhere = Call(slice=call.slice, out=Path("else/where"), inputs=call.inputs)
        recipes = (run_key(call, "quantize", "fp16"), run_key(call, "quantize", "w4a16"))
        return [run_key(call, "calibrate"), run_key(other, "calibrate"), *recipes], run_key(elsewhere, "calibrate")

    different, elsewhere = keys()
    assert len(set(different)) == 4 and elsewhere == different[0]
    assert keys()[0] == different
    (call.inputs["calibrate"] / "stats.safetensors").write_bytes(b"2")
    assert not set(keys()[0]) & set(different)


def test_work_that_is_done_or_refused_leaves_nothing_and_work_that_was_stopped_stays(call):
    for error, stays in ((None, False), (ValueError, False), (OSError, True), (KeyboardInterrupt, True)):
        try:
            with unfinished_work(call, "calibrate") as folder:
                (folder / "00000.json").write_text("{}")
                if error:
                    raise error
        except (ValueError, OSError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert (call.out.parent / ".unfinished").exists() == stays


def test_it_lies_beside_the_cache_which_copies_of_the_project_share(call, tmp_path):
    Path("build").mkdir()
    Path("build/paths.json").write_text(json.dumps({"cache": str(tmp_path / "cache")}))
    with unfinished_work(call, "calibrate") as folder:
        assert folder == tmp_path / "cache/unfinished" / run_key(call, "calibrate")


def test_two_processes_do_not_write_to_one_folder(call):
    with unfinished_work(call, "calibrate") as folder:
        with unfinished_work(call, "calibrate") as second:
            assert second is None
        assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_stops_no_work(call):
    call.out.parent.mkdir()
    (call.out.parent / ".unfinished").write_text("a file")
    with unfinished_work(call, "calibrate") as folder:
        assert folder is None


def test_what_nobody_continues_is_bounded(call, monkeypatch):
    parent = call.out.parent / ".unfinished"
    for number in range(unfinished.MOST_ABANDONED + 3):
        (parent / f"run{number}").mkdir(parents=True)
        os.utime(parent / f"run{number}", (time.time() - number * 86400,) * 2)
    os.utime(parent / "run1", (time.time() - (unfinished.LONGEST_DAYS + 1) * 86400,) * 2)
    with unfinished_work(call, "calibrate") as folder:
        assert {path.name for path in parent.iterdir()} == {"run0", "run2", "run3", "run4", folder.name}
