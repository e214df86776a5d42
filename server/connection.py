"""Connections of clients that take too long: uvicorn waits for the head of a request for ever, and httptools, which
reads it, takes one of any length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

# In the scope of a request: writes a piece of its streamed answer at once, past all that only looks at heads. False,
# and nothing is written, where it would have to wait for the reader or nobody reads: then `send` knows what to do.
WRITE = "ingot.write"
MOST_BESIDE_BODY = 1 << 16
CLOSING = b"connection: close\r\ncontent-length: 0\r\n\r\n"
LATE = b"HTTP/1.1 408 Request Timeout\r\n" + CLOSING
LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + CLOSING
# h11, which reads requests where httptools is not installed, has its own bound of their heads.
READS_ANY_LENGTH = hasattr(AutoHTTPProtocol, "on_body")


def connection_class(seconds: float, refused: Callable[[str], None]) -> type[asyncio.Protocol]:
    """What uvicorn makes of each connection (its option `http`). One whose next head is not whole `seconds` after it
    began is closed, with an answer if any of it came, and so is one with more than MOST_BESIDE_BODY bytes of heads,
    trailers and borders of chunks beyond the size of its body; `refused` is told why."""

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None
        _beside_body = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._late)

        def connection_lost(self, error: Exception | None) -> None:
            self._stop()
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            before: Any = self.cycle
            self._beside_body += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                self._stop()
            elif self.cycle is not before:  # the head is whole
                self._beside_body = 0
                self._stop()
            elif READS_ANY_LENGTH and self._beside_body > MOST_BESIDE_BODY:
                self._end("head_too_large", LARGE)
            elif self._timer is None and (before is None or before.response_complete):
                self._timer = self.loop.call_later(seconds, self._late)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            if (cycle := self.cycle) is not None:
                cycle.scope[WRITE] = partial(write_chunk, cycle)

        def on_body(self, body: bytes) -> None:
            self._beside_body -= 2 * len(body)
            super().on_body(body)

        def _late(self) -> None:
            if self._beside_body:
                self._end("head_timeout", LATE)
            else:  # nothing came: browsers connect ahead
                self.transport.close()

        def _end(self, reason: str, answer: bytes) -> None:
            refused(reason)
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(answer)
            self.transport.close()

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection


def write_chunk(cycle: Any, body: bytes) -> bool:
    """WRITE for a request of uvicorn's (httptools): what its `send` does with a piece of a chunked body."""
    if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True
