"""`response_format`: what the whole answer must look like, and the grammar that makes it so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from engine.config import Grammar
from server.json_schema import UNREAD, followable
from server.shapes import RefusedField, Shape

LARGEST_GRAMMAR = 64 << 10


class TextFormat(Shape):
    type: Literal["text"]


class JsonObjectFormat(Shape):
    type: Literal["json_object"]


class NamedSchema(Shape):
    """`strict` changes nothing: a schema is followed always, or refused."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    # `schema` is a method of pydantic's models.
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Shape):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Shape):
    """Not OpenAI's: the answer matches a regular expression as a whole."""

    type: Literal["regex"]
    regex: Annotated[str, StringConstraints(min_length=1, max_length=LARGEST_GRAMMAR)]


class GrammarFormat(Shape):
    """Not OpenAI's: the answer is a sentence of a grammar in GBNF, whose first rule is `root`."""

    type: Literal["grammar"]
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=LARGEST_GRAMMAR)]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat, Field(discriminator="type")
]


def grammar_of(asked: ResponseFormat | None) -> Grammar | None:
    """The grammar; RefusedField for a schema that cannot be followed to the letter."""
    match asked:
        case JsonObjectFormat():
            return Grammar(kind="json")
        case JsonSchemaFormat(json_schema=named):
            if named.json_schema is None:
                raise RefusedField(
                    "'response_format' of the type 'json_schema' needs a 'schema'.",
                    param="response_format.json_schema.schema",
                    code="missing_required_parameter",
                )
            return Grammar(
                kind="json_schema", text=followable(named.json_schema, param="response_format.json_schema.schema")
            )
        case RegexFormat():
            if UNREAD.search(asked.regex):
                raise RefusedField(
                    "A regex cannot have lookaround, backreferences, or classes beyond \\d \\w \\s.",
                    param="response_format.regex",
                    code="invalid_value",
                )
            return Grammar(kind="regex", text=asked.regex)
        case GrammarFormat():
            return Grammar(kind="ebnf", text=asked.grammar)
    return None
