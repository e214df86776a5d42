"""Timing by turns: on a machine that does other work, what is compared must meet the same weather."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEAST_ROUNDS = 5
# Threads of another library's pool wait so long in a loop after their work before they sleep.
REST = 0.002


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of every run of one thing."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(runs: Mapping[str, Callable[[], object]], *, seconds: float, rest: float = REST) -> dict[str, Turns]:
    """All of `runs` one after the other, again and again, for about so many seconds and at least five rounds. One round
    goes before, uncounted."""
    for work in runs.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        rounds += 1
        for name, work in runs.items():
            time.sleep(rest)
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: Turns(tuple(each)) for name, each in times.items()}
