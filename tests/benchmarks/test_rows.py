from pathlib import Path

import pytest

from benchmarks import rows
from cli.main import main


def test_a_new_column_is_empty_in_the_rows_before(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rows.csv"
    rows.append(file, {"a": 1, "b": "x, y"})
    rows.append(file, {"a": 2, "c": 3})
    assert rows.read(file) == [{"a": "1", "b": "x, y", "c": ""}, {"a": "2", "b": "", "c": "3"}]
    assert [path.name for path in file.parent.iterdir()] == ["rows.csv"]


def test_provenance_names_commit_versions_and_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = rows.provenance()
    assert {"time", "commit", "torch", "device", "processors"} <= found.keys()
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert rows.commit() == "none"
    monkeypatch.setenv("INGOT_COMMIT", "abc123")
    assert rows.commit() == "abc123"


def test_rows_that_could_not_be_kept_are_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "rows.csv"):
        assert main(["bench", "generation", "shape=tiny", "device=cpu", f"out={out}"]) == 1
        assert "cannot be written: name a CSV file" in capsys.readouterr().err
    rows.check_out(tmp_path / "not" / "yet" / "rows.csv")
    rows.check_out(Path("none"))


def test_a_model_that_memory_cannot_hold_is_said_before_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["shape=llama2_7b", "device=cpu", "dtype=float32", "batch=4096", "output=2048", "out=none"]
    assert main(["bench", "generation", *case]) == 1
    said = capsys.readouterr().err
    assert "cpu has" in said
    assert "The weights (fp16, computed in float32)" in said


def test_what_runs_is_said_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.say("loading")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    rows.say("loading")
    assert capsys.readouterr() == ("", "loading ...\n")
