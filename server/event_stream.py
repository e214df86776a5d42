"""Server-sent events, and the watch for a client that has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import ClientGone

Answer = TypeVar("Answer")
DONE = "data: [DONE]\n\n"


# One encoder for all: json.dumps makes one for every call that has options.
encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event_line(content: dict[str, Any]) -> str:
    return f"data: {encoded(content)}\n\n"


class LineStream(StreamingResponse):
    """Sends `lines` as they come. `close` is called at the end, whether all was sent, failed, or the client left."""

    media_type = "application/x-ndjson"

    def __init__(self, lines: AsyncGenerator[str, None], *, close: Callable[[], None]) -> None:
        super().__init__(lines, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._lines = lines
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
            await self._lines.aclose()


class EventStream(LineStream):
    """Lines that are server-sent events."""

    media_type = "text/event-stream"


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled when the client closes its connection: then ClientGone."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(request: Request) -> None:
    # The body was read before, so that the next message can only say that the client is gone.
    while (await request.receive())["type"] != "http.disconnect":
        pass
