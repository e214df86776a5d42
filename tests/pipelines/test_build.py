import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from engine.config import Recipe
from engine.models.cache import page_bytes
from engine.runtime import capability
from engine.runtime.capability import Device
from engine.storage.checkpoint import Checkpoint
from pipelines import build
from pipelines.schema import Config, Model, Weights
from pipelines.selection import Selection, read_rows
from tests.pipelines.built import write_built
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """conf/ of this project and a model, without git; `dvc repro` is replaced by what it would leave behind."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("untouched: true\n")
    (tmp_path / "demo").mkdir()
    write_tiny_checkpoint(tmp_path / "demo/model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


@pytest.fixture
def repro(project, monkeypatch):
    """The selections that `dvc repro` was run for; put an exit code into `codes` to make it stop."""
    seen, codes = [], []

    def run_dvc(folder, arguments, *, environment):
        assert arguments == ["repro"] and folder.parent == project / build.JOBS
        selection = yaml.safe_load((folder / "params.yaml").read_text())
        seen.append(selection)
        axes = ("models", "calibrations", "weights", "tps", "kvs")
        key = "-".join(str(selection[axis][0]) for axis in axes)
        write_built(folder, key, artifact=f"{len(seen)}" * 64)
        (folder / "dvc.lock").write_text("stages: {}\n")
        return codes.pop() if codes else 0

    monkeypatch.setattr(build, "run_dvc", run_dvc)
    return type("Repro", (), {"seen": seen, "codes": codes})


def test_one_artifact(project, repro, capsys):
    assert build.main(["weights=w4a16", "kv=kv8", "tp=2", "weights.group_size=64"]) == 0
    assert repro.seen == [
        {
            "models": ["demo"],
            "calibrations": ["demo_text"],
            "weights": ["w4a16"],
            "tps": [2],
            "kvs": ["kv8"],
            "evaluation": "demo",
            "overrides": [
                "weights.group_size=64",
                f"model.path='{project}/demo/model'",
                f"calibration.path='{project}/demo/text/calibration.txt'",
                f"evaluation.text.path='{project}/demo/text/evaluation.txt'",
                f"evaluation.questions='{project}/demo/text/questions.jsonl'",
                f"store='{project}/store'",
            ],
        }
    ]
    said = capsys.readouterr()
    assert said.out == f"{'1' * 64}  pass  demo-demo_text-w4a16-2-kv8\n"
    assert "there is no git in" in said.err
    assert "writes at most" in said.err and "are free" in said.err
    assert (project / "params.yaml").read_text() == "untouched: true\n"
    assert not list((project / build.JOBS).iterdir())
    assert not (project / "multirun").exists() and not (project / "outputs").exists()


def test_a_sweep_goes_on_after_a_failure(project, repro, capsys):
    repro.codes.append(255)
    arguments = ["-m", "weights=w4a16", "kv=kv16,kv8", "weights.group_size=64,128"]
    assert build.main(arguments) == 1
    assert [(s["kvs"][0], s["overrides"][0]) for s in repro.seen] == [
        ("kv16", "weights.group_size=64"),
        ("kv16", "weights.group_size=128"),
        ("kv8", "weights.group_size=64"),
        ("kv8", "weights.group_size=128"),
    ]
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("failed  ") and "weights.group_size=64" in lines[0]
    assert [line.split("  ")[1] for line in lines[1:]] == ["pass"] * 3
    assert "`dvc repro` stopped with 255" in said.err
    assert not list((project / build.JOBS).iterdir())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(project, repro, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage)
    assert build.main(["weights=w4a16"]) == 1
    assert not repro.seen
    assert "has 1.0 MB free. Free some room" in capsys.readouterr().err


def test_a_machine_that_is_too_small_is_told_so_before_anything_is_written(project, repro, monkeypatch, capsys):
    small = Device(name="cpu", bfloat16=True, int8=True, free_bytes=100_000)
    monkeypatch.setattr(capability, "probe_device", lambda text: small)
    assert build.main(["weights=w4a16", "kv=kv8"]) == 1
    assert not repro.seen
    assert "ingot build: cpu has 0 MiB free. The weights (fp16, computed in float32) take" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["w4a16", "fp16"])
def test_what_is_built_has_to_fit_beside_what_it_is_compared_with(project, monkeypatch, weights):
    config = Config(model=Model(name="m", path="demo/model"), weights=Weights(name=weights, group_size=32))
    model, recipe = Checkpoint(project / "demo/model").config, Recipe(weights=weights, group_size=32)
    page = page_bytes(model, page_len=64, dtype=torch.float32, quantized=False)
    # One page holds the model's 64 positions, and half of what is free is the cache.
    enough = capability.weight_bytes(model, recipe, torch.float32) + 2 * page
    free = [enough]

    def probed(text):
        """A machine that serves 4-bit weights as they are packed; its stages unpack them."""
        return Device(name="cpu", bfloat16=True, int8=True, free_bytes=free[0], int4=(torch.float32,))

    monkeypatch.setattr(capability, "probe_device", probed)
    build.check_device(project, config)
    free[0] = enough - 2
    with pytest.raises(ValueError, match=rf"The weights \({weights}, computed in float32\)"):
        build.check_device(project, config)


def test_a_checkpoint_that_is_not_here_is_not_asked(project):
    build.check_device(project, Config(model=Model(name="m", path="elsewhere", digest="0" * 64)))
    build.check_device(project, Config(model=Model(name="m", digest="0" * 64)))


def test_a_model_that_is_not_known_is_said_before_anything_is_written(project, repro, capsys):
    config = project / "demo/model/config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    assert build.main([]) == 1
    assert not repro.seen
    assert "config.json has architectures = ['MambaForCausalLM']" in capsys.readouterr().err


def test_a_damaged_cache_is_found_after_the_build(project, repro, monkeypatch, capsys):
    monkeypatch.setattr(build, "broken", lambda cache, entries: ["build/export/k/a: absent"])
    assert build.main([]) == 1
    assert "is not whole in the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights=w9"], "Could not find 'weights/w9'"),
        (["weights.bit=3"], "Key 'bit' not in 'Weights'"),
        (["ini.weight_type=fp16"], "ini.weight_type cannot be set: it follows from"),
        (["tp=four"], "could not be converted to Integer"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_typo_is_named_in_one_paragraph(project, arguments, message):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines.build", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights.alpha=3"], "weights.alpha=3.0 must be from 0 to 1"),
        (["ini.cache_max_entry_count=4GB"], "must be a share of memory below 1, or a whole number of pages"),
        (["model=local"], "model.path"),
        (["model=hub", "model.repo=a/b", "model.revision=main"], "model.revision=main must be a commit"),
    ],
)
def test_a_value_that_is_not_allowed_is_one_paragraph(project, repro, capsys, arguments, message):
    assert build.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not repro.seen


def test_the_configuration_can_be_looked_at(project, repro, capsys):
    assert build.main(["--cfg", "job", "weights=w4a16"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["weights"]["name"] == "w4a16" and shown["tp"] == 1
    assert not repro.seen


def test_folders_of_killed_jobs_are_swept(project):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for name in (f"job-{process.pid}-x", f"job-{os.getpid()}-y"):
        (project / build.JOBS / name).mkdir(parents=True)
    build.sweep_jobs(project)
    assert [path.name for path in (project / build.JOBS).iterdir()] == [f"job-{os.getpid()}-y"]


def test_the_estimate_counts_weights_once_and_quantized_ones_besides(project):
    (project / "demo/model/model.safetensors").write_bytes(bytes(1_000_000))
    model = Model(name="demo", path="demo/model")
    fp16 = build.estimate(project, Config(model=model))
    w4a16 = build.estimate(project, Config(model=model, weights=Weights(name="w4a16")))
    assert w4a16 - fp16 == 300_000
    w8a8 = build.estimate(project, Config(model=model, weights=Weights(name="w8a8")))
    assert w8a8 - fp16 == 600_000
    assert fp16 > 1_000_000 + build.SPARE_BYTES
    assert build.estimate(project, Config(model=Model(name="h", repo="a/b"))) == build.SPARE_BYTES


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_the_estimate_counts_pickled_weights_where_they_are_read(project, name):
    (project / "pickled").mkdir()
    (project / "pickled/params.json").write_text("{}")
    (project / "pickled" / name).write_bytes(bytes(1_000_000))
    config = Config(model=Model(name="pickled", path="pickled", allow_bin=True))
    less = build.estimate(project, config)
    (project / "pickled" / name).write_bytes(bytes(6_000_000))
    assert build.estimate(project, config) - less == 5_000_000


def test_paths_of_a_mixture_are_made_absolute_too(project, repro):
    parts = "{chat:{kind:chat,path:chat.jsonl,weight:3},text:{path:/data/text.txt}}"
    assert build.main(["calibration=mixture", f"+calibration.parts={parts}"]) == 0
    [selection] = repro.seen
    assert selection["calibrations"] == ["mixture"]
    wanted = {"chat": f"'{project}/chat.jsonl'", "text": "'/data/text.txt'"}
    for name, path in wanted.items():
        assert f"calibration.parts.{name}.path={path}" in selection["overrides"]
    rows = read_rows(project, Selection(**selection))
    assert rows[0].config.calibration.parts["chat"].path == f"{project}/chat.jsonl"
    assert rows[0].config.calibration.parts["chat"].weight == 3


def test_paths_with_quotes_arrive_unchanged(project):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    config = Config(model=Model(name="m", path="it's a, folder=1"))
    override = build.absolute_paths(project, config)[0]
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.value() == f"{project}/it's a, folder=1"
