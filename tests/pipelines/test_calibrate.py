import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.models.batch import packed
from engine.models.decoder import DecoderLayer
from engine.models.rope import rope_tables
from engine.storage.checkpoint import Checkpoint
from tests.pipelines.stage import CALIBRATION, Build, bytes_of
from tests.pipelines.tiny_checkpoint import TEXT, write_tiny_checkpoint


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return Build(tmp_path / "out", write_tiny_checkpoint(tmp_path / "model"), tmp_path / "text.txt")


def test_statistics_are_those_of_everything_that_flows_through(build, tmp_path):
    out = build.calibrate()
    blocks, statistics = load_file(out / "blocks.safetensors")["tokens"], load_file(out / "stats.safetensors")
    assert blocks.shape == (6, 32) and blocks.dtype == torch.int32
    checkpoint = Checkpoint(tmp_path / "model")
    flows: dict[str, list[torch.Tensor]] = {}
    hidden = torch.nn.functional.embedding(
        blocks.long().flatten(), checkpoint.tensor("model.embed_tokens.weight")
    ).float()
    batch = packed(blocks.tolist())
    with torch.inference_mode():
        for number in range(2):
            layer = DecoderLayer(checkpoint.config, checkpoint.layer(number), device="cpu", dtype=torch.float32)
            prefix = f"model.layers.{number}"
            hidden = layer(
                hidden,
                batch,
                None,
                rope_tables(checkpoint.config, batch),
                lambda module, x, prefix=prefix: flows.__setitem__(f"{prefix}.{module}", x),
            )
    expected = {}
    for name, x in flows.items():
        kind = {"k": "key", "v": "value"}.get(name.rpartition(".")[2])
        where, module = ("inputs", name) if kind is None else (kind, name.removesuffix(f".self_attn.{name[-1]}"))
        expected[f"{where}/min/{module}"], expected[f"{where}/max/{module}"] = x.amin(0), x.amax(0)
        expected[f"{where}/absmax/{module}"] = x.abs().amax(0)
        if kind is None:
            expected[f"inputs/mean/{module}"], expected[f"inputs/absmean/{module}"] = x.mean(0), x.abs().mean(0)
    assert set(statistics) == set(expected) and len(expected) == 2 * (7 * 5 + 2 * 3)
    assert statistics["key/min/model.layers.0"].shape == (2, 16)
    for name, values in expected.items():
        torch.testing.assert_close(statistics[name], values, rtol=1e-4, atol=1e-5)


def test_two_runs_give_equal_bytes_and_another_seed_other_blocks(build):
    first, again = bytes_of(build.calibrate()), bytes_of(build.calibrate())
    assert first == again and set(first) == {"blocks.safetensors", "calibration.json", "stats.safetensors"}
    assert bytes_of(build.calibrate(seed=2))["blocks.safetensors"] != first["blocks.safetensors"]


def test_as_a_command_with_one_and_with_two_threads(build, tmp_path):
    """As dvc.yaml runs it: equal bytes whatever the number of threads, and none of the build system's code."""
    content = {"model": build.model, "calibration": {"text": build.text, **CALIBRATION}}
    Path("slice.json").write_text(json.dumps(content))
    program = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{0}])\n"
        "import torch; torch.set_num_threads({0})\n"
        "from pipelines.calibrate import work; from pipelines.slices import run_stage\n"
        "code = run_stage(work, ['--slice', 'slice.json', '--out', 'threads-{0}'])\n"
        "assert not {{'hydra', 'omegaconf', 'dvc'}} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    for threads in (1, 2):
        subprocess.run([sys.executable, "-c", program.format(threads)], check=True, cwd=tmp_path)
    assert bytes_of(tmp_path / "threads-1") == bytes_of(tmp_path / "threads-2") == bytes_of(build.calibrate())


def test_blocks_longer_than_the_model_are_refused(build):
    with pytest.raises(ValueError, match=r"calibration\.sequence_length=65 is longer than the 64 positions"):
        build.calibrate(sequence_length=65)
    assert not build.root.exists()


def test_nothing_is_left_of_a_calibration_that_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    bad = {"model.layers.1.self_attn.k_proj.weight": torch.full((32, 64), float("nan"))}
    folder = write_tiny_checkpoint(tmp_path / "model", replace=bad)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.k_proj.weight of .* has NaN or Inf"):
        Build(tmp_path / "out", folder, tmp_path / "text.txt").calibrate()
    assert list((tmp_path / "out").iterdir()) == []
