"""Who comes next where several owners share an engine: max-min fairness in running sequences and in prompt tokens."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items

from engine.runtime.sequence import Sequence


class WaitingLine:
    """Sequences that wait. First is one of the owner that has the fewest running, and among equals of the one whose
    last turn is longest ago; among one owner's, the lowest `priority`, then the earliest arrival, which a preempted
    sequence keeps."""

    def __init__(self) -> None:
        self._owners: dict[str, list[Sequence]] = {}
        self._arrivals = 0
        self._admissions = 0
        self._last_admitted: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._owners.values()))

    def __bool__(self) -> bool:
        return bool(self._owners)

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._owners.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        if not sequence.arrival:
            self._arrivals += 1
            sequence.arrival = self._arrivals
        insort(self._owners.setdefault(sequence.owner, []), sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        line = self._owners[sequence.owner]
        del line[bisect_left(line, _place(sequence), key=_place)]
        if not line:
            del self._owners[sequence.owner]

    def first(self, running: Iterable[Sequence]) -> Sequence:
        """Who is to be admitted next; there must be one."""
        counts = Counter(sequence.owner for sequence in running)
        return min(
            (line[0] for line in self._owners.values()),
            key=lambda each: (counts[each.owner], self._last_admitted.get(each.owner, 0), each.arrival),
        )

    def admit(self, sequence: Sequence) -> None:
        """Its turn has come: it waits no more."""
        self.remove(sequence)
        self._admissions += 1
        self._last_admitted[sequence.owner] = self._admissions


class ShortSteps:
    """With `most` above 0, steps compute at most so many sequences that have no prompt left, in turns, for SECONDS
    after an owner came who had none running: the next one waits for a shorter step. It is for devices on which a step
    takes longer the more sequences it has, and costs them some throughput while several owners are about."""

    SECONDS = 10.0

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._until = -math.inf
        self._steps = 0

    def begin(self) -> None:
        """An owner has come."""
        self._until = self._clock() + self.SECONDS

    def resting(self, running: Items[Sequence]) -> set[Sequence]:
        """Those whose turn is not in the next step."""
        if not self._most or self._clock() > self._until:
            return set()
        decoding = [sequence for sequence in running if len(sequence) - sequence.cached == 1]
        return set(sorted(decoding, key=lambda sequence: sequence.turn)[self._most :])

    def took(self, planned: Iterable[Sequence]) -> None:
        """These are in the next step."""
        if not self._most:
            return
        self._steps += 1
        for sequence in planned:
            sequence.turn = self._steps


def unfair(running: Items[Sequence], owner: str) -> Sequence | None:
    """The running sequence that should give way to one of `owner`: the last of the owner that has the most, where that
    is at least two more than `owner` has. One less would only turn the tables."""
    counts = Counter(sequence.owner for sequence in running)
    largest = max(counts, key=lambda each: counts[each], default=owner)
    if counts[largest] < counts[owner] + 2:
        return None
    return next(sequence for sequence in reversed(running) if sequence.owner == largest)


def prompt_limits(needs: Mapping[str, int], budget: int) -> dict[str, int]:
    """How many tokens of prompts each owner may compute in a step of `budget`: all that the others leave, who can claim
    an equal share of it and no more than they need."""
    share = budget // max(1, len(needs))
    claims = {owner: min(need, share) for owner, need in needs.items()}
    return {owner: budget - sum(claims.values()) + claim for owner, claim in claims.items()}


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival
