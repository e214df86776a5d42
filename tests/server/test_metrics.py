import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest

from engine.runtime.event import Event
from server.metrics import Metrics
from tests.server.running import HEADERS, Served

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"
SAMPLE = re.compile(r"(ingot:\w+)(?:\{(.*)\})? (\S+)")


def scrape(served: Served) -> dict[str, float]:
    """The samples without labels but those that tell them apart."""
    response = httpx.get(f"{served.url}/metrics", headers=HEADERS, timeout=30)
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            others = [label for label in labels.split(",") if not label.startswith("model_name=")]
            samples[name + "".join(f"{{{label}}}" for label in others)] = float(value)
    return samples


def ask(served: Served, **body: object) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", **body}, headers=HEADERS, timeout=60)


def test_what_requests_did_is_counted(served: Served) -> None:
    words = "the cat sat on the mat and the dog ran into the rain " * 2
    assert ask(served, prompt=words, max_tokens=4, ignore_eos=True, n=1).status_code == 200
    before = scrape(served)
    usage = ask(served, prompt=words, max_tokens=5, ignore_eos=True, n=2).json()["usage"]
    after = scrape(served)

    def grown(name: str) -> float:
        return after[f"ingot:{name}"] - before.get(f"ingot:{name}", 0)

    assert grown("prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert grown("generation_tokens_total") == 10
    assert grown("prefix_cache_queries_total") == 2 * usage["prompt_tokens"]
    assert 0 < grown("prefix_cache_hits_total") <= grown("prefix_cache_queries_total")
    assert grown('request_success_total{finished_reason="length"}') == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") <= 8  # those that come with a first token have no time between
    assert grown("e2e_request_latency_seconds_count") == 2
    assert grown("request_aborted_total") == 0
    assert grown("e2e_request_latency_seconds_sum") >= grown("time_to_first_token_seconds_sum") > 0
    assert after["ingot:num_requests_running"] == after["ingot:num_requests_waiting"] == 0
    assert after["ingot:kv_cache_usage_perc"] == 0


def test_every_token_after_the_first_piece_has_a_time_of_its_own() -> None:
    now = [10.0]
    metrics = Metrics("tiny", clock=lambda: now[0])
    track = metrics.track(1)
    for time, tokens in ((11.0, (4, 5)), (11.5, (6,)), (13.0, (7, 8, 9))):
        now[0] = time
        event = Event(
            request_id="a",
            token_ids=tokens,
            text="x",
            finish_reason=None,
            prompt_tokens=3,
            cached_tokens=0,
            completion_tokens=0,
        )
        track.take(0, event)
    text = generate_latest(metrics._registry).decode()
    found = {line.split("{")[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("ingot:inter")}
    assert found["ingot:inter_token_latency_seconds_count"] == 4
    assert found["ingot:inter_token_latency_seconds_sum"] == 2.0
    buckets = {bound: float(line.split()[1]) for line in text.splitlines() for bound in ("0.4", "0.5", "2.5", "+Inf")
               if line.startswith(f'ingot:inter_token_latency_seconds_bucket{{le="{bound}",')}  # fmt: skip
    assert buckets == {"0.4": 0, "0.5": 4, "2.5": 4, "+Inf": 4}


def test_a_request_that_is_given_up_is_counted_once() -> None:
    now = [10.0]
    metrics = Metrics("tiny", clock=lambda: now[0])
    track = metrics.track(3)
    for index, reason in ((0, None), (0, "stop"), (1, None)):
        now[0] += 0.5
        track.take(index, Event(request_id="r", token_ids=(1,), text="", finish_reason=reason, prompt_tokens=7,
                                cached_tokens=4, completion_tokens=1))  # fmt: skip
    track.close()
    track.close()
    text = generate_latest(metrics._registry).decode()
    for line in ('request_aborted_total{model_name="tiny"} 2.0', 'prefix_cache_hits_total{model_name="tiny"} 8.0',
                 'time_to_first_token_seconds_sum{model_name="tiny"} 2.0',
                 'finished_reason="stop",model_name="tiny"} 1.0',
                 'inter_token_latency_seconds_sum{model_name="tiny"} 0.5'):  # fmt: skip
        assert line in text


def test_metrics_are_behind_the_key_and_say_nothing_private(served: Served) -> None:
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    ask(served, prompt="private words", max_tokens=1)
    text = httpx.get(f"{served.url}/metrics", headers=HEADERS).text
    assert "private" not in text
    assert "a-test-key" not in text


def test_the_dashboard_asks_for_nothing_that_is_not_there(served: Served) -> None:
    ask(served, prompt="the cat", max_tokens=1)
    known = {name.partition("{")[0] for name in scrape(served)}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {name for panel in dashboard["panels"] for target in panel["targets"]
             for name in re.findall(r"ingot:\w+", target["expr"])}  # fmt: skip
    assert len(asked) > 10
    assert asked <= known


@pytest.mark.parametrize("prompt", [[]])
def test_what_is_refused_before_it_runs_is_no_answer(served: Served, prompt: list[int]) -> None:
    before = scrape(served)
    assert ask(served, prompt=prompt).status_code == 400
    after = scrape(served)
    assert after["ingot:prompt_tokens_total"] == before["ingot:prompt_tokens_total"]
