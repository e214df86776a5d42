import pytest

from pipelines import gate
from tests.pipelines.built import MISS, project_folder, write_built


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(project_folder(tmp_path))
    write_built(tmp_path, "m-c-fp16-1-kv16", artifact="a" * 64)
    write_built(tmp_path, "m-c-w4a16-1-kv16", verdict="fail", gates=[MISS], artifact="b" * 64)
    return tmp_path


def test_a_miss_is_shown_and_fails(project, capsys):
    assert gate.main([]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 artifacts do not pass" in out
    assert "m-c-w4a16-1-kv16" in out and "bbbbbbbbbbbb" in out and "kl_mean" in out and "beyond the bound" in out
    assert "fp16-1" not in out


def test_a_key_alone_is_judged_alone(project, capsys):
    assert gate.main(["m-c-fp16-1-kv16"]) == 0
    assert "1 of 1 artifacts pass" in capsys.readouterr().out
    assert gate.main(["m-c-w4a16-1-kv16"]) == 1


def test_inconclusive_is_not_a_pass(project):
    write_built(project, "m-c-w4a16-1-kv16", verdict="inconclusive", gates=[{**MISS, "verdict": "inconclusive"}])
    assert gate.main([]) == 1
    write_built(project, "m-c-w4a16-1-kv16", verdict="inconclusive")
    assert gate.main([]) == 1


def test_all_passing_is_said_and_0(project, capsys):
    write_built(project, "m-c-w4a16-1-kv16")
    assert gate.main([]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_an_unknown_key_and_an_unfinished_build_are_errors(project, capsys):
    assert gate.main(["m-c-w9-1-kv16"]) == 1
    assert "m-c-w9-1-kv16 is not selected by params.yaml" in capsys.readouterr().err
    (project / "build/publish/m-c-fp16-1-kv16.json").unlink()
    assert gate.main([]) == 1
    assert "not built to the end" in capsys.readouterr().err
