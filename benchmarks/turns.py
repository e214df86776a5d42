"""Timing by turns: on a machine that does other work, what is compared must meet the same weather."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEAST_ROUNDS = 5
# Threads of another library's pool wait so long in a loop after their work before they sleep.
REST = 0.002


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of the runs of one thing, and by which clock: `processor`, which stands still while others compute, for a
    process of one thread; `wall`, of the runs in which the process had to make way for nobody; `wall, interrupted`, of
    all of them, where something that it is compared with has no such run."""

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
    return choose_clock(times, threads)


def _clocks() -> tuple[float, float, float]:
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def choose_clock(times: Mapping[str, Sequence[tuple[float, float, int]]], threads: int) -> dict[str, Turns]:
    """Of (wall, processor, how often interrupted) of every run, what counts: the same kind for all that is compared."""
    if threads == 1:
        return {name: Turns(tuple(each[1] for each in runs), "processor") for name, runs in times.items()}
    if all(any(not interrupted for _, _, interrupted in runs) for runs in times.values()):
        alone = {name: tuple(wall for wall, _, often in runs if not often) for name, runs in times.items()}
        return {name: Turns(walls, "wall") for name, walls in alone.items()}
    return {name: Turns(tuple(each[0] for each in runs), "wall, interrupted") for name, runs in times.items()}
