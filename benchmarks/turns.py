"""Timing by turns: on a machine that does other work, what is compared must meet the same weather."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEAST_ROUNDS = 5
# Threads of another library's pool wait so long in a loop after their work before they sleep.
REST = 0.002


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of the runs of one thing, and by which clock: `processor`, which stands still while others compute, for a
    process of one thread; `wall`, of the runs in which the process had to make way for nobody; `wall, interrupted`, of
    all of them, where there was no such run."""

    seconds: tuple[float, ...]
    clock: str

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(
    runs: Mapping[str, Callable[[], object]], *, seconds: float, threads: int, rest: float = REST
) -> dict[str, Turns]:
    """All of `runs` one after the other, again and again, for about so many seconds and at least five rounds. One round
    goes before, uncounted. `threads` says how many compute."""
    for work in runs.values():
        work()
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    begun, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        rounds += 1
        for name, work in runs.items():
            time.sleep(rest)
            before = _clocks()
            work()
            wall, processor, interrupted = (after - at for after, at in zip(_clocks(), before, strict=True))
            times[name].append((wall, processor, int(interrupted)))
    return {name: _turns(each, threads) for name, each in times.items()}


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _turns(times: list[tuple[float, float, int]], threads: int) -> Turns:
    if threads == 1:
        return Turns(tuple(processor for _, processor, _ in times), "processor")
    if alone := tuple(wall for wall, _, interrupted in times if not interrupted):
        return Turns(alone, "wall")
    return Turns(tuple(wall for wall, _, _ in times), "wall, interrupted")
