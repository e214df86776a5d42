from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.http_client import Answered, stream
from benchmarks.random_workspace import write_workspace
from benchmarks.serving import Sent, figures, started
from benchmarks.shapes import shape
from benchmarks.subject import Subject
from benchmarks.workload import Request
from cli.main import main
from engine.config import Recipe


def test_rates_and_the_engine_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    small = ("rates=20,0", "requests=3", "input=5", "output=6", "streams=2", "streams_output=8")
    assert main(["bench", "serving", "shape=tiny", "device=cpu", *small, f"out={out}"]) == 0
    at_rate, at_once, together = rows.read(out)
    assert [row["case"] for row in (at_rate, at_once, together)] == ["rate", "rate", "streams"]
    for row in (at_rate, at_once):
        assert (row["mean_input"], row["mean_output"], row["requests"]) == ("5", "6.0", "3")
        assert 0 < float(row["first_p50_ms"]) <= float(row["first_p95_ms"]) <= float(row["first_p99_ms"])
        assert float(row["total_p50_ms"]) > float(row["first_p50_ms"])
        assert float(row["tokens_per_piece"]) >= 1
    offline, through = float(together["offline_tokens_per_second"]), float(together["tokens_per_second"])
    assert float(together["http_overhead"]) == pytest.approx(1 - through / offline, abs=0.01)
    overheads = [float(each) for each in together["overheads"].split()]
    assert (len(overheads), overheads[1]) == (3, float(together["http_overhead"]))
    assert overheads == sorted(overheads)
    assert 0 <= float(together["others_share"]) <= 1


def test_a_running_server_and_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = tmp_path / "small", shape("tiny")
    write_workspace(folder, "small", config, Recipe(), session_len=64)
    subject = Subject(
        name="small", config=config, recipe=Recipe(), tp=1, device="cpu", dtype=torch.float32, seed=0, folder=folder
    )
    with started(subject, folder, 2) as address:
        url, out = f"http://{address.host}:{address.port}", tmp_path / "rows.csv"
        asked = ["bench", "serving", f"url={url}", "rates=0", "requests=2", f"out={out}"]
        assert main([*asked, "input=4", "output=5"]) == 0
        [row] = rows.read(out)
        assert (row["engine"], row["model"], row["mean_output"]) == ("server", "small", "5.0")
        assert main([*asked, "input=100", "output=5"]) == 1
        assert "the server answered 400: The prompt has 100 tokens" in capsys.readouterr().err
        assert main([*asked, "input=40", "output=50"]) == 1
        assert "gave 24 tokens where 50 were asked for" in capsys.readouterr().err
        with pytest.raises(ValueError, match="404"):
            stream(address, "/v1/completions", [(0.0, {"model": "other", "prompt": [4]})])[0].answered()


def test_figures_are_those_of_the_answers() -> None:
    answers = [Answered(0.0, (1.0, 1.5, 2.5), 3.0, 6), Answered(1.0, (4.0,), 5.0, 4)]
    found = figures([Request([1], 6), Request([1, 2], 4)], Sent(answers, 0.0002))
    assert found["seconds"] == 5.0
    assert found["tokens_per_second"] == 2.0
    assert (found["tokens_per_piece"], found["client_us_per_token"]) == (2.5, 20.0)
    assert (found["first_p50_ms"], found["gap_p50_ms"], found["total_p50_ms"]) == (2000.0, 750.0, 3500.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["url=http://127.0.0.1:9", "shape=tiny"], "url= names a running server: leave"),
        (["url=http://127.0.0.1:9"], "no server answers at 127.0.0.1:9"),
        (["shape=tiny", "device=cpu", "rates=-1"], "rates is -1, but must be at least 0"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", *arguments, "out=none"]) == 1
    assert message in capsys.readouterr().err
