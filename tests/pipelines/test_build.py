import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import build
from pipelines.schema import Config, Model, Weights
from tests.pipelines.built import write_built

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """conf/ of this project and a model, without git; `dvc repro` is replaced by what it would leave behind."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("untouched: true\n")
    (tmp_path / "demo/model").mkdir(parents=True)
    (tmp_path / "demo/model/config.json").write_text("{}")
    (tmp_path / "demo/model/model.safetensors").write_bytes(bytes(1_000_000))
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


def test_a_damaged_cache_is_found_after_the_build(project, repro, monkeypatch, capsys):
    monkeypatch.setattr(build, "broken", lambda cache, entries: ["build/export/k/a: absent"])
    assert build.main([]) == 1
    assert "is not whole in the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights=w9"], "Could not find 'weights/w9'"),
        (["weights.bit=3"], "Key 'bit' not in 'Weights'"),
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
    model = Model(name="demo", path="demo/model")
    fp16 = build.estimate(project, Config(model=model))
    w4a16 = build.estimate(project, Config(model=model, weights=Weights(name="w4a16")))
    assert w4a16 - fp16 == 300_000
    assert fp16 > 1_000_000 + build.SPARE_BYTES
    assert build.estimate(project, Config(model=Model(name="h", repo="a/b"))) == build.SPARE_BYTES


def test_paths_with_quotes_arrive_unchanged(project):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    config = Config(model=Model(name="m", path="it's a, folder=1"))
    override = build.absolute_paths(project, config)[0]
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.value() == f"{project}/it's a, folder=1"
