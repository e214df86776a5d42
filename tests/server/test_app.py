import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter
from starlette.routing import BaseRoute, Route

from engine.config import EngineConfig
from engine.runtime.client import EngineClient
from engine.runtime.tokenizer import Tokenizer
from server.app import create_app
from server.config import AppConfig, ServedModel
from tests.server.running import KEY, Served

OPEN = AppConfig(model=ServedModel(name="tiny"))
GUARDED = AppConfig(model=ServedModel(name="tiny"), keys={"one": "another-key", "two": KEY})


def ask(folder: Path, method: str, path: str, *, config: AppConfig = OPEN, **options: object) -> httpx.Response:
    """One request to an application whose engine was never started."""

    async def session() -> httpx.Response:
        client = EngineClient(folder, EngineConfig())
        tokenizer = Tokenizer(folder / "triton_models/tokenizer")
        app = create_app(client, tokenizer, config)
        client.session_len = 64
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **options)

    return asyncio.run(session())


def routes(folder: Path) -> list[tuple[str, str]]:
    """(method, path) of every route, from the router itself, and of what is no route."""
    client, tokenizer = EngineClient(folder, EngineConfig()), Tokenizer(folder / "triton_models/tokenizer")
    found: list[tuple[str, str]] = []

    def walk(listed: Sequence[BaseRoute]) -> None:
        for route in listed:
            if isinstance(inner := getattr(route, "original_router", None), APIRouter):  # since FastAPI 0.165
                walk(inner.routes)
            else:
                assert isinstance(route, Route), f"{route} is reached in another way: is it behind the guard?"
                found.extend((method, route.path) for method in sorted(route.methods or ()))

    walk(create_app(client, tokenizer, GUARDED).router.routes)
    return [*found, ("GET", "/nowhere"), ("GET", "/"), ("DELETE", "/v1/models"), ("OPTIONS", "/v1/completions")]


def test_every_route_asks_for_the_key(tiny_folder: Path) -> None:
    listed = routes(tiny_folder)
    known = {
        "/v1/chat/completions",
        "/v1/models/{name:path}",
        "/health/live",
        "/health/ready",
        "/openapi.json",
        "/docs",
    }
    assert known <= {path for _, path in listed}
    wrong = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": KEY},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
    ]
    for method, path in listed:
        browsers = path.startswith(("/docs", "/openapi.json"))
        for headers in wrong:
            response = ask(tiny_folder, method, path, config=GUARDED, headers=headers)
            assert response.status_code == 401, (method, path, headers)
            assert response.headers["www-authenticate"] == ('Basic realm="Ingot"' if browsers else "Bearer")
            if method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"
        for key in (KEY, "another-key"):
            right = ask(tiny_folder, method, path, config=GUARDED, headers={"Authorization": f"Bearer {key}"})
            assert right.status_code != 401, (method, path)


def test_other_origins_read_nothing_unless_asked(tiny_folder: Path) -> None:
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    right = {"Origin": "https://example.org", "Authorization": f"Bearer {KEY}"}
    for method, headers in (("OPTIONS", asks), ("GET", right)):
        response = ask(tiny_folder, method, "/v1/models", config=GUARDED, headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]
    shared = dataclasses.replace(GUARDED, cors_origins=["https://example.org"])
    assert ask(tiny_folder, "OPTIONS", "/v1/models", config=shared, headers=asks).status_code == 200
    response = ask(tiny_folder, "GET", "/v1/models", config=shared, headers=right)
    assert response.headers["access-control-allow-origin"] == "https://example.org"
    other = ask(tiny_folder, "GET", "/v1/models", config=shared, headers={**right, "Origin": "https://example.com"})
    assert "access-control-allow-origin" not in other.headers


def test_without_a_key_none_is_asked_for(tiny_folder: Path) -> None:
    assert ask(tiny_folder, "GET", "/health/live").status_code == 200


def test_a_model_without_a_chat_template_says_so(tiny_folder: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    response = ask(tiny_folder, "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_an_engine_that_has_stopped_is_503(tiny_folder: Path) -> None:
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "hi", "stream": stream}
        response = ask(tiny_folder, "POST", "/v1/completions", json=body)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "server_error"
    assert ask(tiny_folder, "GET", "/health/ready").status_code == 503
    assert ask(tiny_folder, "GET", "/health/live").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b"", 400),
    ],
)
def test_errors_have_one_shape(tiny_folder: Path, method: str, path: str, content: bytes | None, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    response = ask(tiny_folder, method, path, content=content, headers=headers)
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_log_has_neither_key_nor_prompt(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, "wrong-but-secret"):
            body = {"model": "tiny", "prompt": "private words", "max_tokens": 1, "temperature": "private words"}
            headers = {"Authorization": f"Bearer {key}"}
            httpx.post(f"{served.url}/v1/completions", json=body, headers=headers)
    assert caplog.records
    for secret in (KEY, "wrong-but-secret", "private words"):
        assert secret not in caplog.text


def test_ready_once_the_engine_runs(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{served.url}/health/ready", headers=headers).json() == {"status": "ready"}
