"""The key in front of every route: it is asked for before routing, so that a wrong key learns nothing."""

from __future__ import annotations

import base64
import binascii
import hmac
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.keys import Keys
from server.shapes import error_body

OWNER = "ingot.owner"
PAGES = ("/docs", "/openapi.json")


def owner_of(request: Request) -> str:
    """Whose request it is: the name of the key that it came with, empty on a server without keys."""
    owner: str = request.scope.get(OWNER, "")
    return owner


class KeyGuard:
    """Answers 401 to every request without `Authorization: Bearer KEY`. Every request is compared with all keys, in
    constant time.

    A browser has no way to send that when it opens a page, so `Basic` with the key as password is taken as well; for
    the pages at /docs the browser is asked for it.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        # Of digests, the time of a comparison does not even tell a key's length.
        self._digests = [(name, sha256(key.encode()).digest()) for name, key in keys.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif (owner := self._owner(scope)) is not None:
            scope[OWNER] = owner  # not in a copy: the access log, further out, names whose request it was
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = error_body(
                "This server asks for a key: send it as 'Authorization: Bearer KEY'.",
                kind="invalid_request_error",
                code="invalid_api_key",
            )
            asks = 'Basic realm="Ingot"' if scope["path"].startswith(PAGES) else "Bearer"
            response = JSONResponse(body, status_code=401, headers={"WWW-Authenticate": asks})
            await response(scope, receive, send)

    def _owner(self, scope: Scope) -> str | None:
        """The name of the key that came with a request; None for a wrong one or none."""
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, key = given.partition(" ")
        found = key.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                found = base64.b64decode(found, validate=True).partition(b":")[2]
            except binascii.Error:
                found = b""
        elif scheme.lower() != "bearer":
            found = b""
        digest = sha256(found).digest()
        owner = None
        for name, expected in self._digests:
            if hmac.compare_digest(digest, expected):
                owner = name
        return owner
