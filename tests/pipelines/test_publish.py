import json
import shutil

import pytest

from engine.storage.artifacts import verify
from engine.storage.store import Store
from pipelines.provenance import STAGES, stage_keys
from pipelines.publish import work
from pipelines.slices import Call, run_stage, write_json
from pipelines.sources import sha256_file
from tests.engine.storage.tiny_artifact import make_artifact, make_statement

KEY = "m-c-w4a16-1-kv8"


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A project folder in which export and evaluate have run; the call of publish, and the artifact's id."""
    monkeypatch.chdir(tmp_path)
    artifact = make_artifact(tmp_path / "build/export/k")
    paths = {"store": str(tmp_path / "store"), "cache": str(tmp_path / "cache"), "sha256:1": "/data/model"}
    write_json(tmp_path / "build/paths.json", paths)
    for stage, name in stage_keys(KEY).items():
        write_json(tmp_path / f"build/slices/{stage}/{name}.json", {"stage": stage})
        code = "quantize-w4a16" if stage == "quantize" else stage
        write_json(tmp_path / f"build/slices/code/{code}.json", {"all.py": "1", f"{stage}.py": "2"})
    inputs = {"export": tmp_path / "build/export/k", "evaluate": tmp_path / "build/evaluate/k"}
    return Call(slice={"key": KEY}, out=tmp_path / "build/publish/k.json", inputs=inputs), artifact


@pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive"])
def test_artifact_and_statement_are_in_the_store_whatever_the_verdict(built, verdict, tmp_path):
    call, artifact = built
    make_statement(call.inputs["evaluate"], artifact, verdict=verdict)
    work(call)
    statement = sha256_file(call.inputs["evaluate"] / "statement.json")
    assert json.loads(call.out.read_text()) == {"id": artifact, "verdict": verdict, "statement": statement}
    store = Store(tmp_path / "store")
    verify(store.path(artifact), artifact)
    assert [found["predicate"]["verdict"] for found in store.evaluations(artifact)] == [verdict]


def test_publishing_again_corrects_the_verdict(built, tmp_path):
    call, artifact = built
    for verdict in ("pass", "fail", "pass"):
        make_statement(call.inputs["evaluate"], artifact, verdict=verdict)
        work(call)
        newest = Store(tmp_path / "store").evaluations(artifact)[-1]
        assert newest["predicate"]["verdict"] == verdict


def test_an_artifact_whose_folder_is_gone_comes_back_from_the_cache(built, tmp_path):
    call, artifact = built
    make_statement(call.inputs["evaluate"], artifact)
    work(call)
    shutil.rmtree(tmp_path / "store" / artifact)
    verify(Store(tmp_path / "store").path(artifact), artifact)


def test_a_statement_about_another_artifact_is_refused(built, tmp_path, capsys):
    call, _ = built
    make_statement(call.inputs["evaluate"], "f" * 64)
    write_json(tmp_path / "build/slices/publish/k.json", {"key": "k"})
    inputs = [word for name, path in call.inputs.items() for word in ("--in", f"{name}={path}")]
    command = ["--slice", "build/slices/publish/k.json", "--out", str(call.out), *inputs]
    assert run_stage(work, command) == 1
    assert capsys.readouterr().err.startswith("publish k: ")
    assert not call.out.exists()


def test_how_it_was_built_is_kept_and_goes_along_to_a_remote_without_paths(built, tmp_path):
    call, artifact = built
    make_statement(call.inputs["evaluate"], artifact)
    work(call)
    store = Store(tmp_path / "store")
    known = store.provenance(artifact)
    assert known["slices"] == {stage: {"stage": stage} for stage in STAGES} and known["key"] == KEY
    assert known["code"] == {"all.py": "1", **{f"{stage}.py": "2" for stage in STAGES}}
    assert store.places() == {"sha256:1": "/data/model"}
    store.push(tmp_path / "remote", artifact)
    other = Store(tmp_path / "other")
    other.init(tmp_path / "other-cache")
    other.pull(tmp_path / "remote", artifact)
    assert other.provenance(artifact) == known and other.places() == {}
