import importlib

import pytest
import torch

from pipelines.devices import check_device
from pipelines.slices import run_stage, write_json


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "gpu0"])
def test_what_is_no_device_is_named(device):
    with pytest.raises(ValueError, match=f"--device {device} is not known: give cpu, cuda, or cuda:N"):
        check_device(device)


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
def test_a_gpu_that_is_not_there_is_one_paragraph_before_any_work(stage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_json(tmp_path / stage / "key.json", {})
    command = ["--slice", str(tmp_path / stage / "key.json"), "--out", "o", "--device", "cuda"]
    assert run_stage(importlib.import_module(f"pipelines.{stage}").work, command, on_gpus=True) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{stage} key: --device cuda: there is no GPU here that torch can use")
    assert said.count("\n") == 1 and "Leave --device out" in said


def test_a_number_beyond_the_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2: there are 2 GPUs here, counted from cuda:0"):
        check_device("cuda:2")


def test_a_stage_of_the_cpu_alone_says_so(tmp_path, capsys):
    write_json(tmp_path / "shard/key.json", {})
    command = ["--slice", str(tmp_path / "shard/key.json"), "--out", "o", "--device", "cuda"]
    assert run_stage(lambda call: pytest.fail("it worked"), command) == 1
    assert capsys.readouterr().err == (
        "shard key: --device cuda: this stage computes on the CPU alone. Leave --device out.\n"
    )
