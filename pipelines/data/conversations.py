"""Conversations: rows of .jsonl files with chat messages, written out by the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.runtime.tokenizer import Tokenizer
from engine.wording import shown
from pipelines.data.texts import json_rows
from pipelines.slices import locate
from pipelines.sources import CHAT_FILES, text_files

ROLES = ("system", "developer", "user", "assistant")
SHAPE = '{"role": "user", "content": "..."}'
# What a message can say beside its text; the templates here would drop it without a word.
UNSAID = ("tool_calls", "function_call")


def render_conversations(
    record: Mapping[str, Any], tokenizer: Tokenizer, *, locate: Callable[[Mapping[str, Any]], Path] = locate
) -> list[str]:
    """The conversations of a source record of kind `chat`, in its order, as the model reads them; blank ones left out.

    ValueError names the file, the line and what is wrong with it, or says that the model has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"calibration.kind=chat needs a chat template, and {tokenizer.folder} has none: name one "
            "(model.template=chatml, ...), or calibrate on plain text"
        )
    path, found = locate(record), []
    for where, messages in read_conversations(text_files(path, CHAT_FILES), record["column"]):
        if any(message["content"].strip() for message in messages):
            try:
                found.append(tokenizer.chat(messages, add_generation_prompt=False))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no conversation with text in it.")
    return found


def read_conversations(files: list[Path], column: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Where each conversation stands, and its messages as a template takes them: role, content and, if given, name."""
    for path in files:
        for where, row in json_rows(path):
            yield where, _messages(row, column, where)


def _messages(row: Any, column: str, where: str) -> list[dict[str, str]]:
    messages = row.get(column) if isinstance(row, Mapping) else None
    if not isinstance(messages, list):
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"{where} has no list of messages in {column!r} (it has {has}): a line is an object with one, of messages "
            f"like {SHAPE}; set `column` to the field that holds it."
        )
    if not messages:
        raise ValueError(f"{where} has no messages: take the line out.")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"{where} is no message: it is {shown(message)}, not like {SHAPE}.")
    role = message["role"]
    if role not in ROLES:
        raise ValueError(f"{where} has the role {shown(role)}: roles are {', '.join(ROLES)}.")
    if said := [key for key in UNSAID if message.get(key)]:
        raise ValueError(f"{where} has {said[0]}, which no template here writes out: leave such conversations out.")
    named = {"name": message["name"]} if isinstance(message.get("name"), str) else {}
    return {"role": "system" if role == "developer" else role, "content": _content(message, where), **named}


def _content(message: Mapping[str, Any], where: str) -> str:
    """The text of a message: a string, or a list of text parts, as OpenAI's API takes both."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError(f"{where} has no text in `content`: it is {shown(content)}, not a string or a list of text parts.")


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
