"""The turns of a conversation, as OpenAI writes them and as chat templates read them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from server.shapes import RefusedField, Shape, at_most, too_many

MOST_MESSAGES = 4096
MOST_PARTS = 16384
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Shape):
    type: Literal["text"]
    text: str


class CalledFunction(Shape):
    """`arguments` is a JSON object, written as text."""

    name: FunctionName
    arguments: str = Field(max_length=1 << 20)


class ToolCall(Shape):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RefusedField(
                "The arguments of a tool call must be a JSON object, written as text.",
                param="messages",
                code="invalid_value",
            )
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(Shape):
    """One turn. `developer` is OpenAI's newer word for `system` and is passed to the template as that.

    `index` of a tool call and the fields that can only be null are what clients send back of an answer.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Literal[None] | Annotated[list[None], Field(max_length=0)] = None

    @model_validator(mode="after")
    def fits_its_role(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise RefusedField(
                "A message needs 'content'; only an assistant's tool calls can stand alone.",
                param=".content",
                code="missing_required_parameter",
            )
        if self.tool_calls and self.role != "assistant":
            raise RefusedField(
                "Only an assistant's message has 'tool_calls'.", param=".tool_calls", code="invalid_value"
            )
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise RefusedField(
                "A message of the role 'tool', and no other, needs 'tool_call_id'.",
                param=".tool_call_id",
                code="invalid_value",
            )
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn

    @property
    def size(self) -> int:
        """Characters that come to the tokenizer, at least."""
        return len(self.text) + sum(len(call.function.arguments) for call in self.tool_calls or ())


def _few_parts(messages: Any) -> Any:
    if isinstance(messages, list):
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > MOST_PARTS:
            raise too_many(MOST_PARTS, parts)
    return messages


Messages = Annotated[
    list[Message], Field(max_length=MOST_MESSAGES), BeforeValidator(_few_parts), at_most(MOST_MESSAGES)
]
