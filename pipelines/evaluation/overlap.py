"""How much of what is scored was already in the calibration text: an evaluation on seen text flatters an artifact.

A scored token counts as seen if it lies in a run of RUN tokens that also stands in a calibration block (13-grams, as
Brown et al. 2020, appendix C, but of tokens, and counted by token as Touvron et al. 2023, appendix A.6, do). Compared
are the tokens that were read, not files: what a mixture, a chat template or a named data set really gave.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.evaluation.texts import Item

RUN = 13
NOTABLE = 0.05
"""Shares above this are worth a warning; texts of one kind without a passage in common have 0.3 to 2.6%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """`seen_tokens` of `num_tokens` scored ones, by runs of `run` tokens, and `seen_items` of `num_items` items: those
    of which at least half the scored tokens were seen. Answers are short, and among long texts would not be noticed.
    """

    run: int
    seen_tokens: int
    num_tokens: int
    seen_items: int
    num_items: int

    @property
    def notable(self) -> bool:
        """Whether more than NOTABLE of the tokens, or of the items, were seen."""
        return self.seen_tokens > NOTABLE * self.num_tokens or self.seen_items > NOTABLE * self.num_items

    def warning(self) -> str:
        """What it means, in one sentence and a half."""
        return (
            f"{self.seen_tokens} of {self.num_tokens} scored tokens, and most of {self.seen_items} of {self.num_items} "
            f"items, stand in the calibration text too, in runs of {self.run} tokens or more: the figures of this "
            "artifact flatter it. Calibrate and evaluate on different text."
        )


def calibration_overlap(blocks: Iterable[Sequence[int]], items: Sequence[Item], *, run: int = RUN) -> Overlap:
    """Exact, whatever the order of blocks; in memory are the runs of the evaluation and one block of calibration."""
    wanted = {one for item in items for one in _runs(item.token_ids, run)}
    found: set[bytes] = set()
    for block in blocks:
        found.update(wanted.intersection(_runs(block, run)))
    seen = [_seen_tokens(item, found, run) for item in items]
    return Overlap(
        run=run,
        seen_tokens=sum(seen),
        num_tokens=sum(item.num_scored for item in items),
        seen_items=sum(2 * count >= item.num_scored for count, item in zip(seen, items, strict=True)),
        num_items=len(items),
    )


def _seen_tokens(item: Item, found: set[bytes], run: int) -> int:
    marks = bytearray(len(item.token_ids))
    for start, one in enumerate(_runs(item.token_ids, run)):
        if one in found:
            marks[start : start + run] = b"\1" * run
    return sum(marks[item.first_scored :])


def _runs(token_ids: Sequence[int], run: int) -> list[bytes]:
    raw, width = array("i", token_ids).tobytes(), array("i").itemsize
    return [raw[width * start : width * (start + run)] for start in range(len(token_ids) - run + 1)]
