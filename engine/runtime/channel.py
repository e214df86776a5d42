"""Messages between a client and its engine process: msgpack maps, each after its length in four bytes. No pickle."""

from __future__ import annotations

import select
import socket
import threading
from typing import Any

import msgpack

Message = dict[str, Any]
HEADER = 4
LARGEST = 1 << 28


def pack(message: Message) -> bytes:
    """The bytes of one message. ValueError for one above 256 MiB."""
    content: bytes = msgpack.packb(message)
    if len(content) > LARGEST:
        raise ValueError(f"a message of {len(content)} bytes to the engine is above the {LARGEST} allowed")
    return len(content).to_bytes(HEADER, "big") + content


def unpack(content: bytes) -> Message:
    """The message; its lists are tuples, which are quicker to make."""
    message: Message = msgpack.unpackb(content, use_list=False)
    return message


def content_length(header: bytes) -> int:
    length = int.from_bytes(header, "big")
    if length > LARGEST:
        raise ValueError(f"a message of {length} bytes from the engine is above the {LARGEST} allowed")
    return length


class Channel:
    """An end of a socket pair: blocking when idle, never waiting when there is work."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Any thread may send; what two send at once arrives one after the other."""
        content = pack(message)
        with self._sending:
            self._connection.sendall(content)

    def close(self) -> None:
        self._connection.close()

    def receive(self, *, wait: bool) -> list[Message]:
        """All messages that have come; with `wait`, at least one. EOFError when the other end is closed."""
        messages = self._buffered()
        while (wait and not messages) or self._readable():
            piece = self._connection.recv(1 << 20)
            if not piece:
                raise EOFError("the client has closed the channel")
            self._buffer += piece
            messages += self._buffered()
        return messages

    def _readable(self) -> bool:
        # poll, not select: a file descriptor above 1023 is legal in a server with many connections.
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))

    def _buffered(self) -> list[Message]:
        messages: list[Message] = []
        while len(self._buffer) >= HEADER:
            end = HEADER + content_length(bytes(self._buffer[:HEADER]))
            if len(self._buffer) < end:
                break
            messages.append(unpack(bytes(self._buffer[HEADER:end])))
            del self._buffer[:end]
        return messages
