"""Every error as OpenAI's body with a real status code. Texts name the request's own fields, never paths or prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engine.runtime.client import EngineError
from server.access_log import HEADER, NOBODY_WAITED, REQUEST_ID
from server.shapes import RefusedField, error_body

FIELD = re.compile(r"[a-z][a-z_]*")
UNION_TAGS = {"body", "str", "int", "none"}
FORMATS = {"text", "json_object", "json_schema", "regex", "grammar"}
NOT_JSON = "The body is not valid JSON: it must be one object, in UTF-8, and not deeply nested."


# Fields with a choice of types, where a validator names one of them.
ALLOWED = {
    "stop": "a string, or a list of up to 16 of them",
    "messages": "a list of messages, or text",
    "tool_choice": "'none', 'auto', 'required', or an object that names a function",
}


class RequestError(Exception):
    """An answer other than success, made anywhere below an endpoint."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.param = param
        self.code = code


class DeadlineExceeded(EngineError):
    """The request's time is over."""

    @classmethod
    def after(cls, seconds: float) -> DeadlineExceeded:
        return cls(f"The answer took longer than the {seconds:g} seconds that it may take.")


class ClientGone(Exception):
    """The client closed its connection before the answer."""


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _unexpected_error)


def engine_error_body(error: EngineError) -> dict[str, Any]:
    if isinstance(error, DeadlineExceeded):
        return error_body(str(error), kind="server_error", code="deadline_exceeded")
    return error_body("The engine has stopped; the server's log says why.", kind="server_error", code="engine_stopped")


async def _request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    kind = {429: "rate_limit_error", 503: "server_error"}.get(error.status, "invalid_request_error")
    body = error_body(str(error), kind=kind, param=error.param, code=error.code)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(validation_body(error.errors()), status_code=400)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # the framework's own, of a body that Python cannot read
        body = error_body(NOT_JSON, kind="invalid_request_error")
    else:
        body = error_body(f"{request.method} {request.url.path}: {error.detail}", kind="invalid_request_error")
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _engine_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EngineError)
    return JSONResponse(engine_error_body(error), status_code=504 if isinstance(error, DeadlineExceeded) else 503)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=NOBODY_WAITED)  # nobody reads it; the number is for the log


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    body = error_body("The server failed on this request; its log says how.", kind="server_error")
    # This one is answered further out than where other answers get their id.
    return JSONResponse(body, status_code=500, headers={HEADER: request.scope[REQUEST_ID]})


def validation_body(errors: Sequence[Any]) -> dict[str, Any]:
    """One error of many: the deepest, because for a choice of types the others only say that they were not meant."""
    error = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    refused = error.get("ctx", {}).get("error")
    if isinstance(refused, RefusedField):
        param = refused.param
        if param.startswith("."):
            param = (_param(error["loc"]) + param).removeprefix(".")
        return error_body(str(refused), kind="invalid_request_error", param=param, code=refused.code)
    if error["type"] == "json_invalid":
        return error_body(NOT_JSON, kind="invalid_request_error")
    param = _param(error["loc"])
    if error["type"] == "extra_forbidden":
        message, code = f"This server does not know the field {param!r}.", "unknown_parameter"
    elif error["type"] == "missing":
        missing = f"The field {param!r} is missing." if param else "The body is missing: send an object of JSON."
        message, code = missing, "missing_required_parameter"
    elif not param and error["type"].endswith("_type"):
        message, code = "The body must be an object of JSON.", "invalid_value"
    elif param in ALLOWED and error["type"].endswith("_type"):
        message, code = f"{param}: It must be {ALLOWED[param]}.", "invalid_value"
    else:
        message, code = f"{param or 'The body'}: {error['msg']}.", "invalid_value"
    return error_body(message, kind="invalid_request_error", param=param or None, code=code)


def _param(loc: Sequence[int | str]) -> str:
    """`messages[0].content` from pydantic's path, which also names the types that it tried."""
    text = ""
    for position, part in enumerate(loc):
        if part in FORMATS and position and loc[position - 1] == "response_format":
            continue  # the format that was asked for, not a field
        if isinstance(part, int):
            text += f"[{part}]"
        elif position == len(loc) - 1 and not text and part not in UNION_TAGS:
            text = part
        elif part not in UNION_TAGS and FIELD.fullmatch(part):
            text += f".{part}" if text else part
    return text
