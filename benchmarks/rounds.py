"""Rounds of two things that are compared, and which of them count: those in which others computed least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of the processors, what others may take in a round that is not made again.
MOST_OF_OTHERS = 0.05


@dataclass(frozen=True, slots=True)
class Compared:
    """The columns of a round, and the share of the processors that others took in it."""

    columns: dict[str, object]
    others: float

    @property
    def overhead(self) -> float:
        return float(str(self.columns["http_overhead"]))


def are_enough(compared: Sequence[Compared], rounds: int) -> bool:
    """Whether `rounds` were undisturbed, or as many were made again."""
    return sum(each.others <= MOST_OF_OTHERS for each in compared) >= rounds or len(compared) >= 2 * rounds


def median_of(compared: Sequence[Compared], rounds: int) -> dict[str, object]:
    """The columns of the round whose overhead is the median of those in which others took least."""
    counted = sorted(compared, key=lambda each: each.others)[:rounds]
    counted.sort(key=lambda each: each.overhead)
    return {
        **counted[len(counted) // 2].columns,
        "overheads": " ".join(str(each.overhead) for each in counted),
        "others_share": round(max(each.others for each in counted), 3),
    }
