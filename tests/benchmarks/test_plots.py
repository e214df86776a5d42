from pathlib import Path

import pytest

from benchmarks import plots, rows
from cli.main import main


def generation_row(batch: int, speed: float, recipe: str = "fp16", commit: str = "a") -> dict[str, str]:
    row = {"model": "tiny", "device": "cpu", "commit": commit, "engine": "ingot", "recipe": recipe, "input": "1"}
    return row | {"output": "8", "batch": str(batch), "tokens_per_second": str(speed), "floor_tokens_per_second": "90"}


def test_lines_are_told_apart_by_what_differs_and_the_latest_row_counts() -> None:
    found = [
        generation_row(16, 2.0),
        generation_row(2, 1.0),
        generation_row(2, 7.0, recipe="w4a16"),
        generation_row(2, 3.0),
    ]
    names = [
        (name, plots.numbers(line, "batch"), plots.numbers(line, "tokens_per_second"))
        for name, line in plots.lines(found, ("engine", "recipe"), "batch")
    ]
    assert names == [("fp16", [2, 16], [3.0, 2.0]), ("w4a16", [2], [7.0])]
    found.append(generation_row(2, 5.0, commit="b"))
    assert [name for name, _ in plots.lines(found, ("engine", "recipe"), "batch")] == ["fp16, a", "w4a16, a", "fp16, b"]


@pytest.mark.parametrize("suffix", plots.FORMATS)
def test_the_file_is_written_from_the_rows_alone(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    for row in (generation_row(1, 4.0), generation_row(8, 20.0), generation_row(8, 30.0, recipe="w4a16")):
        rows.append(file, row)
    out = tmp_path / f"plot{suffix}"
    command = ["bench", "plot", "of=generation", f"rows={file}", f"out={out}"]
    assert main(command) == 0
    drawn = out.read_bytes()
    assert main(command) == 0
    assert out.read_bytes() == drawn or suffix == ".pdf"
    if suffix == ".svg":
        assert b">w4a16<" in drawn
        assert main([*command, "select=recipe:fp16"]) == 0
        assert b">w4a16<" not in out.read_bytes()


def test_throughput_and_kernels(tmp_path: Path) -> None:
    assert main(["bench", "throughput", "shape=tiny", "device=cpu", "requests=2", f"out={tmp_path / 't.csv'}"]) == 0
    kernel = ["bench", "kernels", "shape=tiny", "kernels=rms_norm", "tokens=1,8", "device=cpu"]
    assert main([*kernel, f"out={tmp_path / 'k.csv'}"]) == 0
    for of, file in (("throughput", "t.csv"), ("kernels", "k.csv")):
        assert main(["bench", "plot", f"of={of}", f"rows={tmp_path / file}", f"out={tmp_path / of}.svg"]) == 0
    assert "rms_norm" in (tmp_path / "kernels.svg").read_text() or "8x128" in (tmp_path / "kernels.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=a.gif"], "a.gif is no plot"),
        (["rows=/nowhere.csv"], "/nowhere.csv is not there: run `ingot bench memory` first"),
        (["of=speed"], "of is 'speed', but must be one of generation"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plot", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_selection_that_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.append(tmp_path / "g.csv", generation_row(1, 2.0))
    base = ["bench", "plot", "of=generation", f"rows={tmp_path / 'g.csv'}", f"out={tmp_path / 'g.svg'}"]
    assert main([*base, "select=recipe:w8a8"]) == 1
    assert "no rows with recipe:w8a8" in capsys.readouterr().err
    assert main([*base, "select=recipe"]) == 1
    assert "write column:value" in capsys.readouterr().err
    assert not (tmp_path / "g.svg").exists()
