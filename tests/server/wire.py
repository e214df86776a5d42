"""Requests written to sockets by hand: read as far as one likes, and broken off in any way."""

import asyncio
import json
import socket
import struct
from typing import Any, Self
from urllib.parse import urlsplit

from tests.server.running import KEY

DATA = b"data: "


class Wire:
    """One request on a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, url: str, *, receive_buffer: int | None = None) -> Self:
        parts = urlsplit(url)
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (parts.hostname, parts.port))
        # A small limit: what is not read stays with the system, and then with the server.
        return cls(*await asyncio.open_connection(sock=connection, limit=1 << 16 if receive_buffer is None else 1024))

    @classmethod
    async def post(
        cls, url: str, path: str, body: dict[str, Any], *, key: str = KEY, receive_buffer: int | None = None
    ) -> Self:
        """The request, sent; its answer has not been read."""
        wire = await cls.open(url, receive_buffer=receive_buffer)
        wire.send(path, body, key=key)
        return wire

    def send(self, path: str, body: dict[str, Any], *, key: str = KEY, share: float = 1.0) -> None:
        """The request, or the first `share` of its bytes."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        written = head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
        self.writer.write(written[: round(len(written) * share)])

    async def event(self) -> dict[str, Any] | None:
        """The next event of a stream; None for its end."""
        while line := await self.reader.readline():
            if line.startswith(DATA):
                content = line[len(DATA) :].strip()
                return None if content == b"[DONE]" else json.loads(content)
            if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise AssertionError((line, await self.reader.read(2000)))
        raise ConnectionError("the server ended the connection before the answer")

    async def texts(self) -> tuple[dict[int, str], dict[str, Any] | None]:
        """The texts of a streamed completion to its end, by the number of the answer, and its usage."""
        texts: dict[int, str] = {}
        usage = None
        while (event := await self.event()) is not None:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        self.writer.close()
        return texts, usage

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """End the connection without a word: what is under way is thrown away."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
