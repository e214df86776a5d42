import time
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.stopwatch import Stopwatch
from cli.main import main


class Worker:
    def outer(self) -> str:
        time.sleep(0.02)
        self.inner()
        return "done"

    def inner(self) -> None:
        time.sleep(0.01)


class Heir(Worker):
    pass


def test_nested_calls_count_once_and_methods_are_put_back() -> None:
    before = Worker.outer, Worker.inner
    with Stopwatch([(Worker, "outer"), (Worker, "inner"), (Worker, "absent")]) as watch:
        assert Worker().outer() == "done"
        time.sleep(0.1)
        Worker().inner()
    assert watch.calls == 2
    assert 0.04 <= watch.seconds < 0.1
    assert (Worker.outer, Worker.inner) == before


def test_an_inherited_method_is_put_back_too() -> None:
    with pytest.raises(ZeroDivisionError), Stopwatch([(Heir, "inner")]) as watch:
        Heir().inner()
        Worker().inner()
        _ = 1 / 0
    assert watch.calls == 1
    assert "inner" not in vars(Heir)


def test_a_row_and_where_the_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    case = ["shape=tiny", "device=cpu", "batch=3", "context=40", "steps=30"]
    assert main(["bench", "profile", *case, f"out={out}"]) == 0
    [row] = rows.read(out)
    assert 0 < float(row["host_share"]) < 1
    assert float(row["host_ms"]) == pytest.approx(float(row["host_share"]) * float(row["step_ms"]), abs=0.01)
    assert 0 < float(row["host_ms"]) <= float(row["host_most_ms"]) >= float(row["host_mean_ms"]) > 0
    assert 0 < float(row["host_processor_ms"]) <= float(row["host_most_ms"])
    assert 25 <= int(row["steps"]) <= 31
    assert "engine/kernels/reference.py" in row["places"]
    assert "engine/kernels/reference.py" in capsys.readouterr().out


def test_sequences_that_never_decode_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    case = ["shape=tiny", "device=cpu", "batch=8", "context=200", "steps=10", "num_tokens_per_iter=64", "out=none"]
    assert main(["bench", "profile", *case]) != 0
    assert "raise num_tokens_per_iter or steps" in capsys.readouterr().err
