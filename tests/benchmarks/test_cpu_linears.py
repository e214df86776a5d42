import pytest

from benchmarks import cpu_linears, rows
from cli.main import main
from engine.kernels import cpu_linear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cpu_linears, "ROTATED_BYTES", 20_000)
    monkeypatch.setattr(cpu_linears, "READ_BYTES", 40_000)


@pytest.mark.skipif(cpu_linear.functions() is None, reason="no C compiler is here")
def test_every_implementation_has_a_row_beside_float32(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert main(["bench", "cpu_linears", "outputs=64", "inputs=128", "rows=1,3", "seconds=0", f"out={out}"]) == 0
    found = rows.read(out)
    names = ["float32", "int4", "int8", "torch int4, bfloat16", "torch int8, bfloat16"]
    assert [(row["rows"], row["implementation"]) for row in found] == [(n, name) for n in "13" for name in names]
    for row in found:
        assert float(row["microseconds"]) <= float(row["median_microseconds"])
        of = next(each for each in found if each["rows"] == row["rows"])
        ratio = float(of["microseconds"]) / float(row["microseconds"])
        assert float(row["times_float32"]) == pytest.approx(ratio, abs=0.01 + 0.05 * ratio)
        assert row["size"] == "64x128" and row["instructions"] and int(row["threads"]) >= 1
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs=64"], "outputs and inputs go together"),
        (["outputs=65", "inputs=128"], "outputs must be a multiple of 16 and inputs one of 128"),
    ],
)
def test_sizes_that_cannot_be_packed_are_refused(capsys, arguments, message):
    assert main(["bench", "cpu_linears", *arguments, "out=none"]) == 1
    assert message in capsys.readouterr().err


def test_without_a_compiler_there_is_nothing_to_measure(capsys, monkeypatch):
    monkeypatch.setattr(cpu_linear, "functions", lambda: None)
    assert main(["bench", "cpu_linears", "out=none"]) == 1
    assert "no compiled kernels" in capsys.readouterr().err
