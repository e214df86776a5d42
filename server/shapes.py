"""What request shapes are made of, and the bodies that every answer shares.

A field is either honoured, accepted because its value asks for nothing, or refused by name: none is dropped in silence.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

MOST_FIELDS = 256
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

    @model_validator(mode="before")
    @classmethod
    def has_few_fields(cls, content: Any) -> Any:
        """An error for each of a million unknown fields would take seconds."""
        if isinstance(content, dict) and len(content) > MOST_FIELDS:
            raise too_many(MOST_FIELDS, len(content))
        return content


def at_most(entries: int) -> BeforeValidator:
    """Of a list or an object: a longer one is refused before any entry of it is looked at, which takes seconds for
    millions."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > entries:
            raise too_many(entries, len(value))
        return value

    return BeforeValidator(check)


def too_many(most: int, found: int) -> PydanticCustomError:
    told = {"most": most, "found": found}
    return PydanticCustomError("too_long", "There are {found} entries, and at most {most} are taken", told)


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
