import json
from pathlib import Path

import pytest

from benchmarks import rows
from cli.main import main


def test_log_normal_requests(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert main(["bench", "throughput", "shape=tiny", "device=cpu", "requests=3", "at_once=2", f"out={out}"]) == 0
    [row] = rows.read(out)
    assert (row["data"], row["requests"], row["at_once"]) == ("log_normal", "3", "2")
    assert float(row["requests_per_second"]) == pytest.approx(3 / float(row["seconds"]), rel=0.01)
    tokens = 3 * float(row["mean_output"])
    assert float(row["tokens_per_second"]) == pytest.approx(tokens / float(row["seconds"]), rel=0.02)
    assert 0 < float(row["share_of_floor"]) < 1


def test_conversations_of_a_file(tmp_path: Path) -> None:
    talks = [{"conversations": [{"value": "a" * size}, {"value": "b" * 6}]} for size in (5, 6, 7)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    out = tmp_path / "rows.csv"
    assert (
        main(
            [
                "bench",
                "throughput",
                "shape=tiny",
                "device=cpu",
                "requests=3",
                f"data={tmp_path}/talks.json",
                f"out={out}",
            ]
        )
        == 0
    )
    [row] = rows.read(out)
    assert (row["data"], row["mean_input"], row["mean_output"]) == ("talks.json", "6.0", "6.0")


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "shape=tiny", "device=cpu", "data=/nowhere", "out=none"]) == 1
    assert "data=/nowhere is not a file" in capsys.readouterr().err
