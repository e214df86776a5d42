"""How families of models write a call of a tool: one row each, found by the chat template.

A call is JSON, `{"name": ..., KEY: {...}}`, between marks. Where the template knows nothing of tools they are told to
the model in a system message, in the row's own words, and calls and results of the conversation are written as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Turn = Mapping[str, Any]


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    @property
    def chat_template(self) -> str | None: ...

    def token_id(self, text: str) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """`begin` and `end` stand around one call, or around a JSON list of calls with `listed`; `separator` between calls.

    `begin` is empty where an answer that starts with a brace is a call. `special` are the marks that are special tokens
    of the vocabulary: to be seen they must not be skipped. `arguments` is the key of the arguments. With `many` one
    answer may have several calls.
    """

    name: str
    begin: str = ""
    end: str = ""
    separator: str = ""
    arguments: str = "arguments"
    special: tuple[str, ...] = ()
    listed: bool = False
    many: bool = True

    def written(self, call: Turn) -> str:
        """A call of the conversation, as the model would have written it."""
        function = call["function"]
        body = json.dumps({"name": function["name"], self.arguments: function["arguments"]}, ensure_ascii=False)
        return f"{self.begin}{body}{self.end}"


HERMES = ToolFormat(name="hermes", begin="<tool_call>\n", end="\n</tool_call>", separator="\n")
MISTRAL = ToolFormat(
    name="mistral", begin="[TOOL_CALLS]", end="", separator=", ", special=("[TOOL_CALLS]",), listed=True
)
LLAMA3 = ToolFormat(name="llama3_json", separator="; ", arguments="parameters", special=("<|python_tag|>",), many=False)
INTERNLM2 = ToolFormat(
    name="internlm2",
    begin="<|action_start|><|plugin|>\n",
    end="<|action_end|>",
    separator="\n",
    arguments="parameters",
    special=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    many=False,
)

# (row, what its templates have)
TEMPLATES: tuple[tuple[ToolFormat, Callable[[str], bool]], ...] = (
    (HERMES, lambda template: "<tool_call>" in template),
    (MISTRAL, lambda template: "[TOOL_CALLS]" in template),
    (INTERNLM2, lambda template: "<|plugin|>" in template),
    (LLAMA3, lambda template: "ipython" in template and '"parameters"' in template),
)


def tool_format(vocabulary: Vocabulary) -> tuple[ToolFormat, bool]:
    """The row of a model, and whether its template itself writes tools, calls and results."""
    template = vocabulary.chat_template or ""
    if "tools" in template:
        for row, holds in TEMPLATES:
            if holds(template):
                return row, True
    if vocabulary.token_id("<|action_start|>") is not None and vocabulary.token_id("<|plugin|>") is not None:
        return INTERNLM2, False
    return HERMES, False


def with_tools(turns: Sequence[Turn], tools: Sequence[Turn], row: ToolFormat) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: they are in the first turn, calls and results are text."""
    told = [_as_text(turn, row) for turn in turns]
    if not tools:
        return told
    if row is INTERNLM2:
        shown = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
        place = 1 if told and told[0]["role"] == "system" else 0
        return [*told[:place], {"role": "system name=<|plugin|>", "content": shown}, *told[place:]]
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    words = (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        'Write a call as <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    )
    if told and told[0]["role"] == "system":
        first = {**told[0], "content": f"{told[0]['content']}\n\n{words}"}
        return [first, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _as_text(turn: Turn, row: ToolFormat) -> dict[str, Any]:
    rest = {key: value for key, value in turn.items() if key not in ("tool_calls", "tool_call_id")}
    if turn.get("tool_calls"):
        calls = row.separator.join(row.written(call) for call in turn["tool_calls"])
        rest["content"] = "\n".join(part for part in (turn["content"], calls) if part)
    elif turn["role"] == "tool":
        if row is INTERNLM2:
            rest["role"] = "environment name=<|plugin|>"
        else:
            rest |= {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    return rest
