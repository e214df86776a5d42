"""Request bodies, read whole before anything looks at them, and refused beyond a size."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.shapes import error_body

SECONDS_TO_LINGER = 2.0


class BodyLimit:
    """Answers 413 to a body of more than `most` bytes, whatever its header says of its length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > self._most:
            await self._refuse(scope, receive, send)
            return
        pieces: list[bytes] = []
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # nobody is left to answer
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            more = message.get("more_body", False)
            if size > self._most:
                await self._refuse(scope, receive, send)
                return
        body: Message | None = {"type": "http.request", "body": b"".join(pieces), "more_body": False}

        async def receive_whole() -> Message:
            nonlocal body
            message, body = body, None
            return message or await receive()

        await self._app(scope, receive_whole, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"The body is larger than the {self._most} bytes that this server takes."
        content = error_body(message, kind="invalid_request_error", code="body_too_large")
        # The connection ends with the answer. What the client still sends is read for a moment and thrown away: a
        # connection that is closed over unread bytes is reset, and the answer may be lost with it.
        response = JSONResponse(content, status_code=413, headers={"Connection": "close"})
        head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await send(head)
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SECONDS_TO_LINGER):
                while (message_ := await receive())["type"] == "http.request" and message_.get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
