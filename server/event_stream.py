"""Server-sent events, and the watch for a client that has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.answers import Answers
from server.connection import WRITE
from server.errors import ClientGone

Answer = TypeVar("Answer")
DONE = "data: [DONE]\n\n"


# One encoder for all: json.dumps makes one for every call that has options.
encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event_line(content: dict[str, Any]) -> str:
    return f"data: {encoded(content)}\n\n"


class LineStream(Response):
    """Sends the `lines` of answers as they come: an iterator gives what has come since, empty where that is nothing.
    `close` is called at the end, whether all was sent, failed, or the client left.

    Texts are written right where the engine's news came in, without a task that wakes up for them. One that a slow
    reader has no room for is waited with, and what comes meanwhile is joined.
    """

    media_type = "application/x-ndjson"

    def __init__(self, answers: Answers, lines: Iterator[str], *, close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._answers = answers
        self._lines = lines
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._write: Callable[[bytes], bool] = scope.get(WRITE, lambda body: False)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with contextlib.suppress(ClientGone):
                await unless_gone(Request(scope, receive), self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        self._unwritten: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._answers.follow(self._write_news)
        self._write_news()
        while (body := await self._unwritten) is not None:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._unwritten = asyncio.get_running_loop().create_future()
            self._write_news()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _write_news(self) -> None:
        """Write what has come. What cannot be written is left in `_unwritten`: None at the end."""
        if self._unwritten.done():
            return
        try:
            for text in self._lines:
                if text and not self._write(body := text.encode()):
                    self._unwritten.set_result(body)
                    return
                if not self._answers.over:
                    return
            self._unwritten.set_result(None)
        except Exception as error:
            self._unwritten.set_exception(error)


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
