"""What conf/ can say of texts: where one comes from, a mixture of several, and how blocks are drawn from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipelines.field_checks import commit, digest, one_of

DATA_SETS = ("wikitext2", "ptb", "c4", "pileval")
TEXT_KINDS = ("text", *DATA_SETS)
SAMPLINGS = ("random", "first", "stratified", "reference")


@dataclass
class Text:
    """A text: .txt or .jsonl file(s) at `path` (`kind: text`), conversations in .jsonl file(s) (`kind: chat`), or a
    named data set, from a local copy at `path` or from the hub (`repo`, `revision`, `subset`, `split`).

    `column` is the field that holds the text, `text` where it is null; of conversations, their `messages`.
    """

    kind: str = "text"
    path: str | None = None
    digest: str | None = None
    repo: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    column: str | None = None


@dataclass
class Part(Text):
    """One text of a mixture: its share of the blocks is its `weight` among those of all parts."""

    weight: float = 1.0


@dataclass
class Calibration(Text):
    """What the observers see: `samples` blocks of `sequence_length` tokens, of one text, or of several `parts` by name.

    `sampling`: at `random` by `seed`, the `first`, `stratified` by the lengths of documents, or the named set's own
    procedure in the `reference`, whose seed is 0.
    """

    name: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    samples: int = 128
    sequence_length: int = 2048
    sampling: str = "random"
    seed: int = 42


def text_parts(calibration: Calibration) -> Mapping[str, Text]:
    """The texts of a calibration by their keys in conf/."""
    if not calibration.parts:
        return {"calibration": calibration}
    return {f"calibration.parts.{name}": part for name, part in calibration.parts.items()}


def calibration_problems(calibration: Calibration) -> Iterator[str]:
    """A sentence for everything that is wrong with a calibration."""
    yield from one_of("calibration.sampling", calibration.sampling, SAMPLINGS)
    for key, number, least in (
        ("samples", calibration.samples, 1),
        ("sequence_length", calibration.sequence_length, 2),
        ("seed", calibration.seed, 0),
    ):
        if number < least:
            yield f"calibration.{key}={number} must be at least {least}"
    for key, text in text_parts(calibration).items():
        yield from text_problems(key, text, kinds=(*TEXT_KINDS, "chat"))
    if calibration.parts:
        yield from _mixture_problems(calibration)
    elif calibration.sampling == "reference" and calibration.kind not in DATA_SETS:
        yield (
            f"calibration.sampling=reference is a procedure for {', '.join(DATA_SETS)} each, and calibration.kind="
            f"{calibration.kind}: take random, first or stratified"
        )


def text_problems(key: str, text: Text, *, kinds: tuple[str, ...] = TEXT_KINDS) -> Iterator[str]:
    """A sentence for everything that is wrong with the text at `key`."""
    yield from one_of(f"{key}.kind", text.kind, kinds)
    yield from digest(f"{key}.digest", text.digest)
    if text.kind in ("text", "chat"):
        if not text.path and not text.digest:
            files = ".jsonl, or a folder of them" if text.kind == "chat" else ".txt, .jsonl, or a folder of them"
            several = " or, for a mixture, calibration.parts" if key == "calibration" else ""
            yield f"{key} has no source: give {key}.path=FILE ({files}){several}"
    elif not text.path and not text.digest:
        if not text.repo:
            yield f"{key}.kind={text.kind} has no pinned hub copy: give {key}.path=COPY, a local copy of the data set"
        else:
            yield from commit(f"{key}.revision", text.revision)


def _mixture_problems(calibration: Calibration) -> Iterator[str]:
    if calibration.kind != "text" or calibration.path or calibration.digest or calibration.repo:
        yield "calibration has a text of its own and parts: make that text one of the parts"
    if calibration.sampling == "reference":
        yield "calibration.sampling=reference knows no mixtures: take random, first or stratified"
    for name, part in calibration.parts.items():
        if not re.fullmatch(r"[a-z0-9_]+", name):
            yield f"calibration.parts.{name}: a name has only a-z, 0-9 and _"
        if not (math.isfinite(part.weight) and part.weight > 0):
            yield f"calibration.parts.{name}.weight={part.weight} must be above 0"
