"""The HTTP application over an engine that runs elsewhere. Nothing is kept at module level."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from engine.runtime.client import EngineClient
from engine.runtime.tokenizer import Tokenizer
from server.access_log import AccessLog
from server.admission import Admission
from server.body_limit import BodyLimit
from server.config import AppConfig
from server.conversations import Conversations
from server.docs_page import docs_router
from server.endpoints import OpenAIEndpoints
from server.errors import RequestError, add_error_handlers
from server.generation import Generation
from server.guard import KeyGuard
from server.interactive import Interactive
from server.metrics import Metrics
from server.tokenization import Tokenization
from server.traces import TraceRequests


def create_app(client: EngineClient, tokenizer: Tokenizer, config: AppConfig) -> FastAPI:
    """The application. `client` must be started by the time that requests come, and is closed by its owner."""
    # The framework's own pages would make the reader's browser fetch scripts from elsewhere.
    app = FastAPI(title="Ingot", docs_url=None, redoc_url=None)
    app.include_router(docs_router("Ingot"))
    add_error_handlers(app)
    admission = app.state.admission = Admission(most=config.max_requests)
    metrics = app.state.metrics = Metrics(config.model.name)
    generation = Generation(client, tokenizer, config.model, admission, metrics, timeout=config.request_timeout)
    app.include_router(OpenAIEndpoints(generation).router)
    app.include_router(Tokenization(generation).router)
    conversations = Conversations(timeout=config.session_timeout, most=config.max_sessions)
    app.include_router(Interactive(generation, conversations).router)
    created = int(time.time())

    def model_entry() -> dict[str, Any]:
        model = config.model
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "ingot",
            "artifact_id": model.artifact_id,
            "verified": model.artifact_id is not None,
            "recipe": model.recipe,
            "verdict": model.verdict,
            "waiver": model.waiver,
            "session_len": client.session_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if not config.model.answers_to(name):
            raise RequestError(
                f"The model {name!r} is not here; this server has {config.model.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        return model_entry()

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return await metrics.respond(client)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        if client.error:
            return JSONResponse({"status": "the engine has stopped"}, status_code=503)
        if admission.draining:
            return JSONResponse({"status": "the server is ending"}, status_code=503)
        return JSONResponse({"status": "ready"})

    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, most=config.max_body_bytes, seconds=config.body_timeout, refused=metrics.refused)
    if config.keys:
        app.add_middleware(KeyGuard, keys=config.keys)
    if config.cors_origins:
        # Outside of the guard: browsers ask what is allowed without a key.
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    if config.traces is not None:
        app.add_middleware(TraceRequests, traces=config.traces, model=config.model.name)
    app.add_middleware(AccessLog, log=config.access_log)
    return app
