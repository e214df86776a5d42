"""The key in front of every route: it is asked for before routing, so that a wrong key learns nothing."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.shapes import error_body


class KeyGuard:
    """Answers 401 to every request without `Authorization: Bearer KEY`. Keys are compared in constant time."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = error_body(
                "This server asks for a key: send it as 'Authorization: Bearer KEY'.",
                kind="invalid_request_error",
                code="invalid_api_key",
            )
            response = JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        normal = f"{scheme.capitalize()} {key.strip()}"
        return hmac.compare_digest(normal.encode("latin-1", "replace"), self._expected)
