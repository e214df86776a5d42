"""A small HTTP/1.1 client for streams of server-sent events, so that the client is not what is measured.

It keeps the time and the bytes of every piece, and reads them when the run is over.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LIMIT = 1 << 24
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
    reader, writer = await _connect(address)
    try:
        writer.write(_head(address, "GET", path))
        return _object(await _status(reader), await reader.read())
    finally:
        writer.close()


async def stream(address: Address, path: str, content: Mapping[str, Any]) -> Answered:
    """Post `content`, with streaming asked for, and read the answer to its end. ValueError where it is refused, breaks
    off, or tells no usage."""
    body = json.dumps({**content, "stream": True, "stream_options": {"include_usage": True}}).encode()
    asked = time.perf_counter()
    reader, writer = await _connect(address)
    arrived: list[tuple[float, bytes]] = []
    try:
        writer.write(_head(address, "POST", path, body))
        status, headers = await _status(reader)
        if status != 200 or headers.get("transfer-encoding") != "chunked":
            _object((status, headers), await reader.read())
            raise ValueError(f"{address.host}:{address.port} did not stream its answer.")
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            piece = await reader.readexactly(size + 2)
            arrived.append((time.perf_counter(), piece[:-2]))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise ValueError(f"the stream of {address.host}:{address.port} broke off.") from error
    finally:
        writer.close()
    return _read(asked, arrived)


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


async def _connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        return await asyncio.open_connection(address.host, address.port, limit=LIMIT)
    except OSError as error:
        raise ValueError(f"no server answers at {address.host}:{address.port}: {error.strerror or error}.") from error


def _head(address: Address, method: str, path: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {address.path}{path} HTTP/1.1", f"Host: {address.host}:{address.port}", "Connection: close"]
    if address.key is not None:
        lines.append(f"Authorization: Bearer {address.key}")
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _status(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return int(head[0].split()[1]), headers


def _object(status: tuple[int, Mapping[str, str]], body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
        message = content["error"]["message"] if status[0] != 200 else ""
    except (ValueError, KeyError, TypeError):
        content, message = {}, "no JSON came"
    if status[0] != 200 or not isinstance(content, dict):
        raise ValueError(f"the server answered {status[0]}: {message}")
    return content
