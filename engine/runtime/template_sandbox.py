"""Jinja in a sandbox, and the process that it runs in: `python -m engine.runtime.template_sandbox`.

The sandbox keeps a template from reaching anything outside. It does not keep it from counting to 10^10 or making a text
of that length, so it runs in a process with limits of its own, started by `chat_template.py`. JSON lines come in, the
template first and then messages; a line goes out for each, with `text` or `error`.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Templates of models take milliseconds and a few megabytes, and write each message once.
SECONDS = 2
MEMORY_BYTES = 512 << 20
# Characters: so many, and so many times what comes in. A tokenizer takes hundreds of bytes for each.
ADDED, TIMES = 1 << 20, 16


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for training; rendering shows its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compiled(text: str) -> jinja2.Template:
    """The template, with the names that templates of models expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(text)


def rendered(template: jinja2.Template, line: bytes, special_tokens: Mapping[str, str]) -> str:
    """The prompt for the messages of a line; ValueError for one of many more characters than the line has."""
    text = template.render(**{"tools": None, **json.loads(line)}, documents=None, **special_tokens)
    if len(text) > (most := ADDED + TIMES * len(line)):
        raise ValueError(f"the text has {len(text)} characters, and at most {most} are taken for these messages")
    return text


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, without HTML escapes, as templates for models expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group; the parent decides when this ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    template: jinja2.Template | None = None
    special_tokens: dict[str, str] = {}
    for line in sys.stdin.buffer:
        # The system ends the process at this limit, wherever it is, and whether or not the parent still lives.
        limit = math.ceil(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            if template is None:
                first = json.loads(line)
                special_tokens = first["special_tokens"]
                template = compiled(first["template"])
                answer = {"text": ""}
            else:
                answer = {"text": rendered(template, line, special_tokens)}
        except Exception as error:  # a template is code of the model's author: it may trip over anything
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
