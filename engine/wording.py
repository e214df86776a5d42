"""How pieces of files that others wrote are shown in messages: cut, so that a message stays a paragraph."""

from __future__ import annotations

LONGEST = 160


def cut(text: str, longest: int = LONGEST) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def shown(value: object) -> str:
    """The `repr` of a value, cut."""
    return cut(repr(value))
