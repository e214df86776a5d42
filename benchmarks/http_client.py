"""A small HTTP/1.1 client for streams of server-sent events, so that the client is not what is measured.

It keeps the time and the bytes of every piece that arrives, and reads them when the run is over. All connections are
looked after in one thread, without a framework: what it takes of the processor, the server may need. When some have
news it takes those and sleeps for a millisecond: a server that writes to 64 streams in turn would wake it 64 times
else. So times are late by up to a millisecond, and by a round trip where another request connects meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
import urllib.parse
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

SECONDS_TO_GATHER = 0.001
PIECE = 1 << 14
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


def get(address: Address, path: str) -> dict[str, Any]:
    """The JSON object at `path`; ValueError, in the server's words, for any status but 200."""
    [received] = _exchange(address, [(0.0, _head(address, "GET", path))])
    return _object(received)


def stream(address: Address, path: str, posts: Sequence[tuple[float, Mapping[str, Any]]]) -> list[Streamed]:
    """Post each content at its time, in seconds from now, with streaming asked for, and keep all that comes until the
    connections end."""
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [(at, json.dumps({**content, **asked}).encode()) for at, content in posts]
    return _exchange(address, [(at, _head(address, "POST", path, body)) for at, body in bodies])


@dataclass(slots=True)
class Streamed:
    """What a server sent: pieces of bytes, and the time of each. Two lists, since garbage collection goes through
    every tuple that is kept."""

    asked: float
    times: list[float] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)

    def answered(self) -> Answered:
        """The streamed answer. ValueError, in the server's words, where it was refused, broke off, or told no usage."""
        whole = b"".join(self.pieces)
        status, headers, begin = _status(whole)
        if status != 200 or headers.get("transfer-encoding") != "chunked":
            _object(self)
            raise ValueError("the server did not stream its answer.")
        return _read(self.asked, self._chunks(whole, begin))

    def _chunks(self, whole: bytes, begin: int) -> list[tuple[float, bytes]]:
        """The chunks of the body, which begins there, each with the time at which its last byte came."""
        ends = list(accumulate(map(len, self.pieces)))
        found: list[tuple[float, bytes]] = []
        while (line := whole.find(b"\r\n", begin)) > 0 and (size := int(whole[begin:line].split(b";")[0], 16)):
            begin = line + 2 + size + 2
            last = line + 2 + size - 1
            if last >= len(whole):
                break
            found.append((self.times[bisect_right(ends, last)], whole[line + 2 : last + 1]))
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


def _exchange(address: Address, requests: Sequence[tuple[float, bytes]]) -> list[Streamed]:
    """What came of each request, sent at its time, until its connection ended."""
    begun = time.perf_counter()
    answers = [Streamed(begun + at) for at, _ in requests]
    ahead = deque(sorted(range(len(requests)), key=lambda number: requests[number][0]))
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        while ahead or selector.get_map():
            wait = max(answers[ahead[0]].asked - time.perf_counter(), 0) if ahead else None
            ready = selector.select(wait)
            now = time.perf_counter()
            connection: Any
            for (connection, _, _, answer), _ in ready:
                if piece := _piece(connection):
                    answer.times.append(now)
                    answer.pieces.append(piece)
                else:
                    selector.unregister(connection)
                    connection.close()
            while ahead and answers[ahead[0]].asked <= time.perf_counter():
                number = ahead.popleft()
                connection = stack.enter_context(_connected(address))
                answers[number].asked = time.perf_counter()
                connection.sendall(requests[number][1])
                selector.register(connection, selectors.EVENT_READ, answers[number])
            if ready:
                time.sleep(SECONDS_TO_GATHER)
    return answers


def _connected(address: Address) -> socket.socket:
    try:
        return socket.create_connection((address.host, address.port))
    except OSError as error:
        raise ValueError(f"no server answers at {address.host}:{address.port}: {error.strerror or error}.") from error


def _piece(connection: socket.socket) -> bytes:
    """What has come; empty at the end, however that came about."""
    try:
        return connection.recv(PIECE)
    except OSError:
        return b""


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
    whole = b"".join(received.pieces)
    status, _, begin = _status(whole)
    try:
        content = json.loads(whole[begin:])
        message = content["error"]["message"] if status != 200 else ""
    except (ValueError, KeyError, TypeError):
        content, message = {}, "no JSON came"
    if status != 200 or not isinstance(content, dict):
        raise ValueError(f"the server answered {status}: {message}")
    return content
