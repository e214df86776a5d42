"""Request bodies, read whole before anything looks at them, and refused beyond a size or a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.shapes import error_body

SECONDS_TO_LINGER = 2.0


class BodyLimit:
    """Answers 413 to a body of more than `most` bytes, whatever its header says of its length, and 408 to one that is
    not there `seconds` after its head. `refused` is told why."""

    def __init__(self, app: ASGIApp, *, most: int, seconds: float, refused: Callable[[str], None]) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "0")
        too_large = f"The body is larger than the {self._most} bytes that this server takes."
        if told.isdecimal() and int(told[:20]) > self._most:
            await self._refuse(413, "body_too_large", too_large, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                whole = await self._read(receive)
        except TimeoutError:
            late = f"The body did not come within the {self._seconds:g} seconds that this server waits for it."
            await self._refuse(408, "body_timeout", late, receive, send)
            return
        if whole is None:
            return  # nobody is left to answer
        if len(whole) > self._most:
            await self._refuse(413, "body_too_large", too_large, receive, send)
            return
        body: Message | None = {"type": "http.request", "body": whole, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal body
            message, body = body, None
            return message or await receive()

        await self._app(scope, receive_whole, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or more than `most` bytes of one that is larger; None where the client has gone."""
        pieces: list[bytes] = []
        size = 0
        more = True
        while more and size <= self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
        return b"".join(pieces)

    async def _refuse(self, status: int, code: str, message: str, receive: Receive, send: Send) -> None:
        self._refused(code)
        content = error_body(message, kind="invalid_request_error", code=code)
        # The connection ends with the answer. What the client still sends is read for a moment and thrown away: a
        # connection that is closed over unread bytes is reset, and the answer may be lost with it.
        response = JSONResponse(content, status_code=status, headers={"Connection": "close"})
        head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await send(head)
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_TO_LINGER):
                while (message_ := await receive())["type"] == "http.request" and message_.get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
