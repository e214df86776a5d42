import io
import json
import time
from collections.abc import Iterator
from datetime import datetime

import httpx
import pytest

from server.config import ServeConfig
from tests.server.conftest import CONFIG
from tests.server.running import HEADERS, KEY, Served, serving
from tests.tiny_artifact import write_tiny_artifact

SECRET = "the rain in the secret"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, io.StringIO]]:
    folder, log = tmp_path_factory.mktemp("logged"), io.StringIO()
    with serving(folder, write_tiny_artifact(folder), CONFIG, access_log=log) as served:
        yield served, log


def entry(log: io.StringIO, request_id: str) -> dict:
    """The one line about a request; it is written after the client has its answer."""
    deadline = time.monotonic() + 20
    while True:
        lines = [line for line in log.getvalue().splitlines() if request_id in line]
        if lines:
            [line] = lines
            return json.loads(line)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_tells_who_asked_what_and_how_much(logged: tuple[Served, io.StringIO], stream: bool) -> None:
    served, log = logged
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": 5, "ignore_eos": True, "n": 2, "stream": stream}
    asked = f"mine-{stream}"
    response = httpx.post(
        f"{served.url}/v1/completions?trace={KEY}", json=body, headers={**HEADERS, "X-Request-ID": asked}, timeout=60
    )
    assert response.headers["x-request-id"] == asked
    found = entry(log, asked)
    assert datetime.fromisoformat(found.pop("time")).utcoffset() is not None
    assert found.pop("milliseconds") > 0
    assert found == {
        "request_id": asked,
        "key": "test",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "prompt_tokens": len(served.tokenizer.encode(SECRET)),
        "completion_tokens": 10,
    }
    assert KEY not in log.getvalue()
    assert "secret" not in log.getvalue()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "key", "route"),
    [
        ("GET", "/v1/models/x", HEADERS, 404, "test", "/v1/models/{name:path}"),
        ("GET", "/health/live", HEADERS, 200, "test", "/health/live"),
        ("GET", f"/{KEY}", HEADERS, 404, "test", None),
        ("GET", "/v1/models", {"Authorization": "Bearer wrong"}, 401, None, None),
        ("POST", "/v1/completions", HEADERS, 400, "test", "/v1/completions"),
    ],
)
def test_refusals_have_a_line_and_an_id_too(
    logged: tuple[Served, io.StringIO],
    method: str,
    path: str,
    headers: dict[str, str],
    status: int,
    key: str | None,
    route: str | None,
) -> None:
    served, log = logged
    response = httpx.request(method, served.url + path, headers={**headers, "X-Request-ID": "two words"})
    assert response.status_code == status
    found = entry(log, response.headers["x-request-id"])
    assert response.headers["x-request-id"].isalnum()
    assert (found["status"], found["key"], found["route"]) == (status, key, route)
    assert found["prompt_tokens"] is found["completion_tokens"] is None
    assert KEY not in log.getvalue()


def test_without_a_log_there_is_an_id_all_the_same(served: Served) -> None:
    ids = {httpx.get(f"{served.url}/health/live", headers=HEADERS).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_there_are_three_kinds() -> None:
    with pytest.raises(ValueError, match=r"serve\.access_log is 'xml', but must be text, json or none"):
        ServeConfig(access_log="xml")
