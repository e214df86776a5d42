"""Chat templates: Jinja text from a model's folder, rendered in a process with limits (`template_sandbox.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.runtime.confined_process import ConfinedProcess
from engine.runtime.template_sandbox import MEMORY_BYTES, SECONDS
from engine.wording import cut, shown


def read_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` if there is one, else `chat_template` of tokenizer_config.json (of several, `default`)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}): fetch it again") from error
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, list):
        named: dict[str, str] = {row["name"]: row["template"] for row in entry if _is_named(row)}
        if "default" not in named:
            raise ValueError(
                f"{folder}: tokenizer_config.json names the chat templates {shown(sorted(named))}, no 'default'"
            )
        entry = named["default"]
    if entry is not None and not isinstance(entry, str):
        raise ValueError(f"{folder}: chat_template of tokenizer_config.json is a {type(entry).__name__}, not a string")
    return entry


def _is_named(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("template"), str)


class ChatTemplate:
    """A template, compiled in a process that lives as long as this object. Calls from several threads take turns."""

    def __init__(self, text: str, *, source: str, special_tokens: Mapping[str, str]) -> None:
        """ValueError, naming `source`, where the text is not a valid template."""
        self._process = ConfinedProcess(
            "engine.runtime.template_sandbox",
            {"template": text, "special_tokens": dict(special_tokens)},
            refused=f"{source}: the chat template is not valid",
            ended=f"the model's chat template was ended: it may take {SECONDS} s of computing and "
            f"{MEMORY_BYTES >> 20} MiB, and takes more for this",
        )
        self._process.start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for `messages`, with `tools` in OpenAI's shape. ValueError with the template's own words when it
        refuses them, and where it takes more than SECONDS of computing or MEMORY_BYTES."""
        asked = {
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._process.ask(asked)
        if "error" in answer:
            raise ValueError(f"the model's chat template does not accept these messages: {cut(answer['error'], 1000)}")
        return answer["text"]
