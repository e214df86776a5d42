from pathlib import Path

import pytest

from benchmarks import rows
from cli.main import main


def test_two_ranks_measure_what_they_say_to_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    assert main(["bench", "collectives", "shape=tiny", "tokens=1,3", "device=cpu", f"out={out}"]) == 0
    found = rows.read(out)
    assert [(row["model"], row["tp"], row["tokens"]) for row in found] == [("tiny", "2", "1"), ("tiny", "2", "3")]
    for row in found:
        for name in ("sum_us", "maxima_us", "rows_us", "own_rows_us", "logits_us", "drawn_us"):
            assert float(row[name]) > 0
        # Two layers of two linears each.
        cost = 4 * (float(row["rows_us"]) - float(row["own_rows_us"])) / 1e3
        assert float(row["maxima_ms_a_step"]) == pytest.approx(cost, abs=1e-3)
        assert float(row["sums_ms_a_step"]) == pytest.approx(4 * float(row["sum_us"]) / 1e3, abs=1e-3)
    assert "tokens=3" in capsys.readouterr().out


def test_ranks_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "collectives", "shape=tiny", "tp=4", "device=cpu", "out=none"]) == 1
    assert "its 2 key/value heads cannot be dealt to 4 ranks; tp that fits: 1, 2" in capsys.readouterr().err
