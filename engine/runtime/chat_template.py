"""Chat templates: Jinja text from a model's folder, rendered in a process with limits (`template_sandbox.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.runtime.template_sandbox import MEMORY_BYTES, SECONDS
from engine.wording import cut, shown

PACKAGES = str(Path(__file__).resolve().parents[2])


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
        self._source = source
        self._first = {"template": text, "special_tokens": dict(special_tokens)}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        with self._lock:
            self._start()

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
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._answer(asked)
        if "error" in answer:
            raise ValueError(f"the model's chat template does not accept these messages: {cut(answer['error'], 1000)}")
        return answer["text"]

    def _start(self) -> None:
        # -P and PYTHONPATH: the same package as here, whatever lies in the working directory.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.runtime.template_sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._end = weakref.finalize(self, _end, self._process)
        answer = self._answer(self._first)
        if "error" in answer:
            raise ValueError(f"{self._source}: the chat template is not valid: {cut(answer['error'])}")

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, str]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the answer that does not come says as well
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._end()
            raise ValueError(
                f"the model's chat template was ended: it may take {SECONDS} s of computing and "
                f"{MEMORY_BYTES >> 20} MiB, and takes more for this"
            )
        answer: dict[str, str] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what it did not read any more
            if stream is not None:
                stream.close()
