"""Swagger's page at /docs, from a package: a reader's browser fetches nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

PACKAGE = "fastapi_offline"
FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# The page runs one script of its own; nothing may come from, or go to, another place.
POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


def docs_router(title: str) -> APIRouter:
    """The page and the files that it needs."""
    router = APIRouter(include_in_schema=False)
    found = find_spec(PACKAGE)  # its files are wanted, not its code
    assert found is not None and found.submodule_search_locations, f"{PACKAGE} is a dependency"
    folder = Path(found.submodule_search_locations[0]) / "static"

    @router.get("/docs")
    async def page() -> HTMLResponse:
        html = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="data:,",
        )
        html.headers["Content-Security-Policy"] = POLICY
        return html

    for name, kind in FILES.items():
        router.add_api_route(f"/docs/{name}", _file(folder / name, kind), methods=["GET"])
    return router


def _file(path: Path, kind: str) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(path, media_type=kind)

    return send
