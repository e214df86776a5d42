"""From the text of an answer to content and tool calls, as the text comes."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.tool_formats import ToolFormat

# A call that does not come to its arguments within so many characters is none.
LONGEST_HEAD = 4096
# What may stand between a mark or a call and the next call.
BETWEEN = " \t\r\n[,;"
ALPHABET = string.ascii_letters + string.digits
# A call up to its arguments, the function's name first, as every row's models write it.
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return "".join(secrets.choice(ALPHABET) for _ in range(9))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """A piece of call number `index`: its `name` and id once, then its arguments, which joined are a JSON object."""

    index: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None

    def as_delta(self) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        return {"index": self.index, "id": self.id, "type": "function", "function": {"name": self.name, **function}}


Piece = str | CallPiece


class ToolParser:
    """Takes an answer in pieces and gives back content (text) and pieces of calls.

    The arguments of a call are passed on as they come. What looks like the beginning of a call is held back; if it
    turns out to be none, it is content as it was written. Blanks between calls are dropped. `calls` is how many have
    begun.
    """

    def __init__(self, row: ToolFormat, *, forced: bool = False) -> None:
        """`forced`: the answer can be nothing but calls, and what is left of one that was cut is no content."""
        self.calls = 0
        self._forced = forced
        self._row = row
        self._begin = row.begin.rstrip("\n")
        self._end = row.end.strip()
        self._text = ""
        self._said = self._between = False
        self._scan = _ObjectScan()
        self._move: Callable[[list[Piece], bool], bool] = self._outside

    def push(self, text: str) -> list[Piece]:
        self._text += text
        return self._advance(final=False)

    def finish(self) -> list[Piece]:
        """What is left when no more text comes."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._move(pieces, final):  # False when it needs more text
            pass
        return pieces

    def _outside(self, pieces: list[Piece], final: bool) -> bool:
        if self._between:
            self._text = self._text.lstrip()
        if not self._begin:
            return self._bare(pieces, final)
        at = self._text.find(self._begin)
        if at >= 0:
            self._content(pieces, at)
            self._move = self._head
            return True
        kept = 0 if final else _overlap(self._text, self._begin)
        self._content(pieces, len(self._text) - kept)
        return False

    def _bare(self, pieces: list[Piece], final: bool) -> bool:
        """A row without a mark: only an answer that starts with a brace is a call."""
        text = self._text.lstrip()
        for mark in self._row.special:
            text = text.removeprefix(mark).lstrip()
        if not self._said and text.startswith("{"):
            self._move = self._head
            return True
        waits = not text or any(mark.startswith(text) for mark in self._row.special)
        if final or self._said or not waits:
            self._content(pieces, len(self._text))
        return False

    def _head(self, pieces: list[Piece], final: bool) -> bool:
        """At a mark: the name of a call, or what shows that this is none."""
        text = self._text.removeprefix(self._begin)
        for mark in self._row.special:
            text = text.lstrip().removeprefix(mark)
        text = text.lstrip(BETWEEN)
        if found := HEAD.match(text):
            self._call(pieces, json.loads(found[1]))
            self._text, self._scan, self._move = text[found.end() :], _ObjectScan(), self._arguments
            return True
        over = final or (bool(self._end) and self._end in text) or len(text) > LONGEST_HEAD
        if not over:
            return False
        if not self._other_order(pieces, text):
            self._content(pieces, len(self._text))
            self._move = self._outside
            return False
        return True

    def _other_order(self, pieces: list[Piece], text: str) -> bool:
        """A call whose arguments come before its name, or whose arguments are text: read when it is whole."""
        try:
            call, size = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._call(pieces, call["name"])
        pieces.append(CallPiece(index=self.calls - 1, arguments=written))
        self._text, self._move = "}" + text[size:], self._tail
        return True

    def _call(self, pieces: list[Piece], name: str) -> None:
        pieces.append(CallPiece(index=self.calls, name=name, id=call_id()))
        self.calls += 1
        self._between = True

    def _arguments(self, pieces: list[Piece], final: bool) -> bool:
        size = self._scan.push(self._text)
        if size:
            pieces.append(CallPiece(index=self.calls - 1, arguments=self._text[:size]))
            self._text = self._text[size:]
        if self._scan.whole:
            self._move = self._tail
        return self._scan.whole

    def _tail(self, pieces: list[Piece], final: bool) -> bool:
        """Behind the arguments of a call: its closing brace, its end mark, and whether another follows at once."""
        text = self._text.lstrip().removeprefix("}").lstrip()
        if self._end and text.startswith(self._end):
            text = text.removeprefix(self._end)
        elif not final and (not text or self._end.startswith(text)):
            return False
        if not self._end and text[:1] in (",", ";"):
            self._text, self._move = text, self._head
            return True
        self._text, self._move = text.removeprefix("]") if self._row.listed else text, self._outside
        return True

    def _content(self, pieces: list[Piece], size: int) -> None:
        if size:
            if not self._forced:
                self._said, self._between = True, False
                pieces.append(self._text[:size])
            self._text = self._text[size:]


class _ObjectScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.whole = False
        self._depth = 0
        self._string = False
        self._escaped = False

    def push(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped = character == "\\"
                self._string = character != '"'
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.whole = True
                    return place + 1
        return len(text)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
