"""How much longer than a text the work of a tokenizer.json may become: a few steps, each doubling it, take all memory.

Steps of one kind are counted, not the text: the bound holds for every text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Real files replace one character by a few, once or twice; Precompiled is a table of normal forms.
MOST = 4096
SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
INNER = ("normalizers", "pretokenizers", "processors", "decoders")
TIMES = {"ByteLevel": 2, "Precompiled": 32}


def check_growth(content: Mapping[str, Any], file: Path) -> None:
    """ValueError naming the file and its section where the steps of one section could make a text more than MOST times
    as long. What is not a section that the library knows is left to the library."""
    for section in SECTIONS:
        times = 1
        for step in _steps(content.get(section)):
            times *= _times(step)
            if times > MOST:
                raise ValueError(
                    f"{file} has a {section} whose steps may make a text more than {MOST} times as long: no model does"
                )


def _steps(section: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(section, Mapping):
        yield section
        for name in INNER:
            for step in _list(section.get(name)):
                yield from _steps(step)


def _times(step: Mapping[str, Any]) -> int:
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        # A pattern may match nothing, between any two characters.
        pattern = step.get("pattern")
        whole = isinstance(pattern, Mapping) and bool(pattern.get("String"))
        return max(1, len(content) + (not whole))
    if kind == "TemplateProcessing":
        pieces = [step.get("single"), step.get("pair")]
        counts = [sum(isinstance(one, Mapping) and "Sequence" in one for one in _list(piece)) for piece in pieces]
        return max(1, *counts)
    return TIMES.get(str(kind), 1)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
