"""The grammar of an answer that calls tools, as xgrammar's structural tag."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import Grammar
from server.json_schema import followable
from server.tool_formats import ToolFormat, Vocabulary
from server.tools import Tool

Format = dict[str, Any]


def call_grammar(tools: Sequence[Tool], row: ToolFormat, vocabulary: Vocabulary, *, many: bool) -> Grammar:
    """An answer that is one call, or with `many` one and more, of `tools`, each with arguments that validate.

    RefusedField where a function's parameters cannot be followed to the letter.
    """
    calls: Format = {
        "type": "tags_with_separator",
        "tags": [_call(tool, row) for tool in tools],
        "separator": f"{row.end}{row.separator}{row.begin}" if not row.listed else row.separator,
        "at_least_one": True,
        "stop_after_first": not (many and row.many),
    }
    before, after = (f"{row.begin} [", f"]{row.end}") if row.listed else (row.begin, row.end)
    elements = [*_marks(before, row, vocabulary), calls, *_marks(after, row, vocabulary)]
    return _grammar({"type": "sequence", "elements": elements})


def free_grammar(tools: Sequence[Tool], row: ToolFormat) -> Grammar | None:
    """Any text, in which what begins like a call is one whose arguments validate; None for a row without a mark that is
    text of its own."""
    if not row.begin or row.special or row.listed:
        return None
    tags = []
    for tool in tools:
        call = _call(tool, row)
        tags.append({**call, "begin": row.begin + call["begin"], "end": call["end"] + row.end})
    return _grammar({"type": "triggered_tags", "triggers": [row.begin.rstrip("\n")], "tags": tags})


def _call(tool: Tool, row: ToolFormat) -> Format:
    schema = json.loads(followable(tool.parameters, param=f"tools.{tool.function.name}.parameters"))
    return {
        "type": "tag",
        "begin": f'{{"name": "{tool.function.name}", "{row.arguments}": ',
        # At most one blank between two parts: with more a model can go on for ever.
        "content": {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1},
        "end": "}",
    }


def _marks(text: str, row: ToolFormat, vocabulary: Vocabulary) -> list[Format]:
    """`text` as formats: a special token by its id, what lies between as it is written."""
    formats: list[Format] = []
    while text:
        at, mark = min(
            ((text.find(mark), mark) for mark in row.special if mark in text and vocabulary.token_id(mark) is not None),
            default=(len(text), ""),
        )
        if at:
            formats.append({"type": "const_string", "value": text[:at]})
        if mark:
            formats.append({"type": "token", "token": vocabulary.token_id(mark)})
        text = text[at + len(mark) :]
    return formats


def _grammar(form: Format) -> Grammar:
    text: Mapping[str, Any] = {"type": "structural_tag", "format": form}
    return Grammar(kind="structural_tag", text=json.dumps(text))
