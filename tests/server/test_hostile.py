"""What nobody sends by mistake: every answer is a 4xx in one shape, soon, and tells nothing of the machine."""

import json
import re
import socket
import time

import httpx
import pytest

from server.config import AppConfig, ServedModel
from tests.server.running import HEADERS, KEY, Served
from tests.server.test_app import ask

CHAT, COMPLETIONS, INTERACTIVE = "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive"
# A path, an address of memory or of a machine, a piece of a traceback.
TELLING = re.compile(r"/(tmp|home|root|usr|var)/|site-packages|0x[0-9a-f]{6,}|127\.0\.0\.1|localhost|Traceback|\.py\b")


def deep(levels: int, opening: str = '{"a":', inside: str = "1", closing: str = "}") -> str:
    return opening * levels + inside + closing * levels


def chat(**more: object) -> str:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **more})


def tool(**parameters: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": "HERE"}}
BODIES: list[tuple[str, str, str | bytes]] = [
    ("invalid UTF-8", CHAT, b'{"model": "tiny", "messages": "\xff\xfe\xfa"}'),
    ("invalid UTF-8 in a key", CHAT, b'{"\xc3\x28": 1}'),
    ("UTF-16", CHAT, '{"model": "tiny"}'.encode("utf-16")),
    ("a lone surrogate", CHAT, '{"model": "tiny", "messages": "\\ud800"}'),
    ("deep arrays", CHAT, deep(100_000, "[", "", "]")),
    ("deep objects", CHAT, deep(100_000)),
    ("unfinished deep arrays", CHAT, "[" * 1_000_000),
    ("deep for a shape alone", CHAT, '{"model": "tiny", "messages": ' + deep(900, "[", "", "]") + "}"),
    ("a deep neutral field", CHAT, '{"model": "tiny", "messages": "a", "metadata": ' + deep(900) + "}"),
    ("deep tool parameters", CHAT, chat(tools=[tool(properties="HERE")]).replace('"HERE"', deep(700))),
    ("a deep schema", CHAT, chat(response_format=SCHEMA).replace('"HERE"', deep(700, '{"items":', "{}"))),
    ("a null byte in the model", CHAT, chat(model="tiny\0")),
    ("null bytes around", CHAT, "\0" + chat() + "\0"),
    ("a number of a million digits", CHAT, '{"model": "tiny", "messages": "a", "max_tokens": ' + "9" * 1_000_000 + "}"),
    ("an exponent", CHAT, '{"model": "tiny", "messages": "a", "temperature": 1e999999}'),
    ("not a number", CHAT, '{"model": "tiny", "messages": "a", "temperature": NaN}'),
    ("n", CHAT, chat(n=129)),
    ("n below", CHAT, chat(n=0)),
    ("many stops", CHAT, chat(stop=["a"] * 1000)),
    ("a long stop", CHAT, chat(stop="a" * 100_000)),
    ("an empty stop", CHAT, chat(stop=[""])),
    ("a large bias", CHAT, chat(logit_bias={str(token): 1 for token in range(5000)})),
    ("a bias for no token", CHAT, chat(logit_bias={"999999999": 1})),
    ("a bias for a negative token", CHAT, chat(logit_bias={"-1": 1})),
    ("many tools", CHAT, chat(tools=[tool()] * 1000)),
    ("a long regex", CHAT, chat(response_format={"type": "regex", "regex": "a" * 1_000_000})),
    ("many messages", CHAT, chat(messages=[{"role": "user", "content": "a"}] * 5000)),
    ("an endless prompt", COMPLETIONS, json.dumps({"model": "tiny", "prompt": "a" * 1_000_000})),
    ("many prompts", COMPLETIONS, json.dumps({"model": "tiny", "prompt": ["a"] * 5000})),
    ("many ids", COMPLETIONS, json.dumps({"model": "tiny", "prompt": [1] * 500_000})),
    ("an id of no token", COMPLETIONS, json.dumps({"model": "tiny", "prompt": [2**31 - 1]})),
    ("a negative id", COMPLETIONS, json.dumps({"model": "tiny", "prompt": [-1]})),
    ("a path for a model", CHAT, chat(model="../../etc/passwd")),
    ("a file for an image", CHAT, chat(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}])),
    ("a URL for an image", CHAT, chat(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}])),
    ("a path for a session", INTERACTIVE, '{"prompt": "a", "session_id": "../1", "interactive_mode": true}'),
    ("a session beyond int64", INTERACTIVE, '{"prompt": "a", "session_id": 1e40, "interactive_mode": true}'),
    ("many ids as text", "/detokenize", json.dumps({"tokens": [5] * 1_000_001})),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_bodies(served: Served, path: str, body: str | bytes) -> None:
    headers = {**HEADERS, "Content-Type": "application/json"}
    response = httpx.post(served.url + path, content=body, headers=headers, timeout=30)
    assert 400 <= response.status_code < 500, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not TELLING.search(json.dumps(error)), error
    assert len(response.content) < 4000


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../etc/passwd",
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models//etc/passwd",
        "/v1/models/tiny%00",
        "/v1/models/%ff%fe",
        "/v1/models/" + "a" * 5000,
        "/docs/../../etc/passwd",
        "/docs/..%2f..%2fetc%2fpasswd",
        "/docs/%2e%2e%2fapp.py",
        "/static/../etc/passwd",
    ],
)
def test_paths(served: Served, path: str) -> None:
    """Written to the socket as it is: a client library would clean it up."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    status = int(answer.split()[1])
    assert 400 <= status < 500, answer[:300]
    assert b"root:" not in answer
    assert len(answer) < 8000


def test_a_body_is_refused_beyond_its_size_whatever_it_says(tiny_folder) -> None:  # type: ignore[no-untyped-def]
    small = AppConfig(model=ServedModel(name="tiny"), max_body_bytes=2000)

    async def pieces():  # type: ignore[no-untyped-def]
        for _ in range(3):
            yield b" " * 1000

    for content in (b" " * 2001, pieces()):
        refused = ask(tiny_folder, "POST", CHAT, config=small, content=content)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "body_too_large"
    assert ask(tiny_folder, "POST", CHAT, config=small, content=b" " * 2000).status_code == 400


def test_a_giant_body_is_refused_before_it_is_read(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {10**12}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 1000)
        assert b" 413 " in connection.recv(1 << 16).split(b"\r\n")[0]


def test_the_server_is_as_well_as_before(served: Served) -> None:
    began = time.monotonic()
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 4}
    assert httpx.post(served.url + COMPLETIONS, json=body, headers=HEADERS, timeout=30).status_code == 200
    assert time.monotonic() - began < 20
    assert served.unfinished() == 0
