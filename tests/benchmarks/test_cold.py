from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.random_workspace import write_workspace
from benchmarks.shapes import shape
from cli.main import main
from engine.config import Recipe


def test_the_parts_add_up_to_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert main(["bench", "cold", "shape=tiny", "device=cpu", "repeats=1", "cache=dropped", f"out={out}"]) == 0
    [row] = rows.read(out)
    parts = [float(row[name]) for name in ("import_seconds", "load_seconds", "token_seconds")]
    assert all(part > 0 for part in parts)
    assert float(row["seconds"]) == pytest.approx(sum(parts), abs=0.01)
    assert (row["cache"], row["verify"], len(row["artifact"])) == ("dropped", "true", 12)


def test_a_changed_byte_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "w"
    write_workspace(folder, "tiny", shape("tiny"), Recipe())
    with (folder / "triton_models/weights/norm.weight").open("r+b") as file:
        file.write(b"\x00\x01")
    assert main(["bench", "cold", f"folder={folder}", "device=cpu", "repeats=1", "out=none"]) == 1
    said = capsys.readouterr().err
    assert "norm.weight" in said
    assert "damaged" in said
    assert said.count("\n") == 1


def test_without_a_manifest_nothing_can_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "w"
    write_workspace(folder, "tiny", shape("tiny"), Recipe())
    (folder / "manifest.json").unlink()
    assert main(["bench", "cold", f"folder={folder}", "device=cpu", "out=none"]) == 1
    assert "say verify=false" in capsys.readouterr().err
