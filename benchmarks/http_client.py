"""A small HTTP/1.1 client for streams of server-sent events, so that the client is not what is measured.

It keeps the time and the bytes of every piece that arrives, and reads them when the run is over. When one has come it
sleeps for a millisecond and takes what came meanwhile: a server that writes to 64 streams in turn would wake it 64
times else, on a processor that the server may need. So times are late by up to a millisecond.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, cast

SECONDS_TO_GATHER = 0.001
DATA = b"data: "
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and the key that it asks for."""

    host: str
    port: int
    path: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """One streamed answer: when it was asked for, when each piece with text came, when it was over, and its tokens."""

    asked: float
    pieces: tuple[float, ...]
    ended: float
    tokens: int


def address_of(url: str, key: str | None = None) -> Address:
    """The address of a server from its URL, with or without `/v1`; ValueError for what is none."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise ValueError(f"url={url} is not understood: write http://HOST:PORT, as `ingot serve` prints it.")
    return Address(parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"), key)


async def get(address: Address, path: str) -> dict[str, Any]:
    """The JSON object at `path`; ValueError, in the server's words, for any status but 200."""
    return _object(await _exchange(address, _head(address, "GET", path)))


async def stream(address: Address, path: str, content: Mapping[str, Any]) -> Streamed:
    """Post `content`, with streaming asked for, and keep all that comes until the connection ends."""
    body = json.dumps({**content, "stream": True, "stream_options": {"include_usage": True}}).encode()
    return await _exchange(address, _head(address, "POST", path, body))


class Streamed(asyncio.Protocol):
    """What a server sent: pieces of bytes, each with its time."""

    _sleep_is_due: ClassVar[bool] = False

    def __init__(self, request: bytes) -> None:
        self.asked = time.perf_counter()
        self.arrived: list[tuple[float, bytes]] = []
        self.ended = asyncio.get_running_loop().create_future()
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's are of no class of asyncio

    def data_received(self, data: bytes) -> None:
        self.arrived.append((time.perf_counter(), data))
        if not Streamed._sleep_is_due:
            Streamed._sleep_is_due = True
            asyncio.get_running_loop().call_soon(self._sleep)

    @staticmethod
    def _sleep() -> None:
        """The whole loop sleeps, after what has come by now was taken."""
        Streamed._sleep_is_due = False
        time.sleep(SECONDS_TO_GATHER)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def answered(self) -> Answered:
        """The streamed answer. ValueError, in the server's words, where it was refused, broke off, or told no usage."""
        whole = b"".join(piece for _, piece in self.arrived)
        status, headers, begin = _status(whole)
        if status != 200 or headers.get("transfer-encoding") != "chunked":
            _object(self)
            raise ValueError("the server did not stream its answer.")
        return _read(self.asked, self._chunks(whole, begin))

    def _chunks(self, whole: bytes, begin: int) -> list[tuple[float, bytes]]:
        """The chunks of the body, which begins there, each with the time at which its last byte came."""
        ends = list(accumulate(len(piece) for _, piece in self.arrived))
        found: list[tuple[float, bytes]] = []
        while (line := whole.find(b"\r\n", begin)) > 0 and (size := int(whole[begin:line].split(b";")[0], 16)):
            begin = line + 2 + size + 2
            last = line + 2 + size - 1
            if last >= len(whole):
                break
            found.append((self.arrived[bisect_right(ends, last)][0], whole[line + 2 : last + 1]))
        else:
            if line > 0:
                return found
        raise ValueError("a stream broke off.")


def _read(asked: float, arrived: list[tuple[float, bytes]]) -> Answered:
    pieces: list[float] = []
    tokens: int | None = None
    rest = b""
    for at, chunk in arrived:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            if not event.startswith(DATA) or event[len(DATA) :] == DONE:
                continue
            content = json.loads(event[len(DATA) :])
            if "error" in content:
                raise ValueError(f"the server ended a stream: {content['error'].get('message')}")
            if content.get("usage"):
                tokens = content["usage"]["completion_tokens"]
            if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in content["choices"]):
                pieces.append(at)
    if tokens is None or not pieces:
        raise ValueError("a stream ended without text or without its usage.")
    return Answered(asked, tuple(pieces), arrived[-1][0], tokens)


async def _exchange(address: Address, request: bytes) -> Streamed:
    try:
        transport, received = await asyncio.get_running_loop().create_connection(
            lambda: Streamed(request), address.host, address.port
        )
    except OSError as error:
        raise ValueError(f"no server answers at {address.host}:{address.port}: {error.strerror or error}.") from error
    try:
        await received.ended
    finally:
        transport.close()
    return received


def _head(address: Address, method: str, path: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.host}:{address.port}", "Connection: close"]
    if address.key is not None:
        lines.append(f"Authorization: Bearer {address.key}")
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _status(whole: bytes) -> tuple[int, dict[str, str], int]:
    """Status, headers, and where the body begins."""
    head, _, _ = whole.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    words = first.split()
    return int(words[1]) if len(words) > 1 else 0, headers, len(head) + 4


def _object(received: Streamed) -> dict[str, Any]:
    whole = b"".join(piece for _, piece in received.arrived)
    status, _, begin = _status(whole)
    try:
        content = json.loads(whole[begin:])
        message = content["error"]["message"] if status != 200 else ""
    except (ValueError, KeyError, TypeError):
        content, message = {}, "no JSON came"
    if status != 200 or not isinstance(content, dict):
        raise ValueError(f"the server answered {status}: {message}")
    return content
