"""A server with more requests than it takes, and requests with less time than they need."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.server.conftest import CONFIG
from tests.server.running import HEADERS, KEY, Served, serving
from tests.tiny_artifact import write_tiny_artifact

LONG = {"model": "tiny", "prompt": "the cat", "max_tokens": 100, "ignore_eos": True}


OTHER = "another-test-key"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("narrow")
    with serving(
        folder, write_tiny_artifact(folder), CONFIG, max_requests=16, keys={"test": KEY, "other": OTHER}
    ) as found:
        yield found


def test_beyond_the_bound_is_429_with_the_time_to_wait(narrow: Served) -> None:
    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{narrow.url}/v1/completions", json={**LONG, "n": 4}, headers=HEADERS, timeout=120)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= 4
    assert statuses.count(429) >= 1
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert narrow.unfinished() == 0
    assert ask(0).status_code == 200


def test_a_request_ends_at_its_deadline(narrow: Served) -> None:
    headers = {**HEADERS, "X-Request-Timeout": "0.001"}
    for path, body in (("/v1/completions", {**LONG, "n": 8}), ("/v1/chat/interactive", {"prompt": "the cat"})):
        late = httpx.post(narrow.url + path, json=body, headers=headers, timeout=60)
        assert late.status_code == 504, late.text
        assert late.json()["error"]["code"] == "deadline_exceeded"
    streamed = httpx.post(f"{narrow.url}/v1/completions", json={**LONG, "stream": True}, headers=headers, timeout=60)
    assert streamed.status_code in (200, 504)  # 200 where it was on its way already
    assert "deadline_exceeded" in streamed.text
    assert "[DONE]" not in streamed.text
    assert narrow.unfinished() == 0
    in_time = {**HEADERS, "X-Request-Timeout": "100"}
    assert httpx.post(f"{narrow.url}/v1/completions", json=LONG, headers=in_time, timeout=60).status_code == 200
    for wrong in ("0", "-1", "soon", "nan", "1e9", "1" * 50):
        asked = httpx.post(
            f"{narrow.url}/v1/completions", json=LONG, headers={**HEADERS, "X-Request-Timeout": wrong}, timeout=60
        )
        assert asked.status_code == 400


def test_priority_is_taken(narrow: Served) -> None:
    for priority, status in ((-5, 200), (0, 200), (2**40, 400), ("first", 400)):
        body = {**LONG, "max_tokens": 2, "priority": priority}
        assert httpx.post(f"{narrow.url}/v1/completions", json=body, headers=HEADERS, timeout=60).status_code == status


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(narrow: Served, stream: bool) -> None:
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(30, read=0.02)) as http:
            body = {**LONG, "n": 16, "stream": stream}
            with http.stream("POST", f"{narrow.url}/v1/completions", json=body, headers=HEADERS) as answer:
                answer.read()
                time.sleep(1)
                raise httpx.ReadTimeout("it was too fast")
    deadline = time.monotonic() + 20
    while narrow.unfinished():
        assert time.monotonic() < deadline
    assert httpx.post(f"{narrow.url}/v1/completions", json={**LONG, "n": 16}, headers=HEADERS, timeout=60).is_success


def test_a_text_is_not_read_before_its_request_is_let_in(narrow: Served) -> None:
    """A flood of long texts costs no more than the places of its key: this one is too long, which nobody finds out."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "the cat sat on the mat " * 1400}]}
    engine = psutil.Process(narrow.client.process_id)
    engine.suspend()
    try:
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=narrow.url, timeout=60) as http:
            sixteen = pool.submit(http.post, "/v1/completions", json={**LONG, "n": 16}, headers=HEADERS)
            deadline = time.monotonic() + 20
            time.sleep(0.2)
            while (refused := http.post("/v1/chat/completions", json=chat, headers=HEADERS)).status_code == 400:
                assert time.monotonic() < deadline
                time.sleep(0.2)
                if sixteen.done():  # it came while this one had a place, and there were fifteen
                    sixteen = pool.submit(http.post, "/v1/completions", json={**LONG, "n": 16}, headers=HEADERS)
            other = http.post("/v1/chat/completions", json=chat, headers={"Authorization": f"Bearer {OTHER}"})
            engine.resume()
            assert sixteen.result().status_code == 200
    finally:
        engine.resume()
    assert refused.status_code == 429
    assert (other.status_code, other.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_the_deadline_counts_from_the_arrival(narrow: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the cat sat on the mat " * 1400}]}
    headers = {**HEADERS, "X-Request-Timeout": "0.000001"}
    late = httpx.post(f"{narrow.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
