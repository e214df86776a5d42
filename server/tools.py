"""`tools` and `tool_choice`: what a model may call, and what it must."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.messages import FunctionName
from server.shapes import RefusedField, Shape, at_most

MOST_TOOLS = 128


class Function(Shape):
    name: FunctionName
    description: str | None = Field(default=None, max_length=1 << 14)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.parameters
        return {"type": "function", "function": function}

    @property
    def parameters(self) -> dict[str, Any]:
        """Without any, a function takes an empty object."""
        return self.function.parameters or {"type": "object", "properties": {}}


class NamedFunction(Shape):
    name: FunctionName


class NamedChoice(Shape):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice
Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS), at_most(MOST_TOOLS)]


def check_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> None:
    """RefusedField for names that are not clear."""
    names = [tool.function.name for tool in tools or ()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RefusedField(f"The function {twice[0]!r} is there twice.", param="tools", code="invalid_value")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise RefusedField(
            f"'tool_choice' names {choice.function.name!r}, which is not among 'tools'.",
            param="tool_choice",
            code="invalid_value",
        )
    if choice in ("auto", "required") and not names:
        raise RefusedField("'tool_choice' is only allowed with 'tools'.", param="tool_choice", code="invalid_value")


def callable_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """The tools that this answer may call."""
    if choice == "none":
        return []
    if isinstance(choice, NamedChoice):
        return [tool for tool in tools or () if tool.function.name == choice.function.name]
    return tools or []
