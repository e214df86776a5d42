"""What request shapes are made of, and the bodies that every answer shares.

A field is either honoured, accepted because its value asks for nothing, or refused by name: none is dropped in silence.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)]


class RefusedField(ValueError):
    """A field, or a value of it, that this server cannot honour. A `param` with a dot in front is one of the object
    that was being read."""

    def __init__(self, message: str, *, param: str, code: str = "unsupported_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Shape(BaseModel):
    """An object of a request: a field that it does not name is an error."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(*, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def same_value(given: Any, neutral: Any) -> bool:
    """`==` alone would take True for 1 and 0 for False."""
    return given == neutral and isinstance(given, bool) == isinstance(neutral, bool)
