"""An id for every request, told in its answer, and a JSON line about it when it has ended. No text of a prompt, an
answer, a key or a path that a caller made up is in it."""

from __future__ import annotations

import json
import re
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.guard import OWNER

if TYPE_CHECKING:
    from server.answers import Answers

HEADER = "X-Request-ID"
REQUEST_ID = "ingot.request_id"
ANSWERS = "ingot.answers"
ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
NOBODY_WAITED, FAILED = 499, 500


class AccessLog:
    """Gives each request the id that its header X-Request-ID asks for (one word of up to 128 characters), else one of
    its own, and writes a line to `log`, if there is one. It must see the scope that the router changes."""

    def __init__(self, app: ASGIApp, log: TextIO | None) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(HEADER, "")
        request_id = scope[REQUEST_ID] = asked if ID.fullmatch(asked) else uuid.uuid4().hex
        status = NOBODY_WAITED
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = FAILED
            raise
        finally:
            if self._log is not None:
                self._log.write(_line(scope, status=status, seconds=time.monotonic() - began))
                self._log.flush()


def _line(scope: Scope, *, status: int, seconds: float) -> str:
    answers: Answers | None = scope.get(ANSWERS)
    usage = answers.usage() if answers is not None else {}
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": scope[REQUEST_ID],
        "key": scope.get(OWNER) or None,
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", None),
        "status": status,
        "milliseconds": round(seconds * 1000, 1),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
    }
    return json.dumps(entry) + "\n"
