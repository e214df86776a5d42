"""When the tokens of requests came: what every engine's run is reduced to, and what rows are made from. Torch-free."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.workload import Request

if TYPE_CHECKING:
    from engine.runtime.engine import Engine


@dataclass(slots=True)
class Timeline:
    """Seconds since the start. `first` is the first token of each request that has one, `ended` its last; `steps` are
    the lengths of the steps that computed no prompt, where the engine shows its steps."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def time_to_first(self) -> float | None:
        """The median over the requests; None where no engine told."""
        return statistics.median(self.first) if self.first else None

    @property
    def step(self) -> float | None:
        """The median length of a decode step; None where there was none."""
        return statistics.median(self.steps) if self.steps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What an engine made of one case: when tokens came, its name and version, and how long it took to be ready."""

    timeline: Timeline
    engine: str
    load_seconds: float


def run(engine: Engine, requests: Sequence[Request]) -> Timeline:
    """Answer all requests, greedily and to their full lengths, as fast as the engine does. It must be idle before."""
    from engine.config import Sampling

    timeline = Timeline()
    waiting: set[str] = set()
    begun = before = time.perf_counter()
    for request in requests:
        sampling = Sampling(max_new_tokens=request.new_tokens, temperature=0.0, ignore_eos=True)
        waiting.add(engine.add(list(request.prompt_ids), sampling))
    running = 0
    while engine.has_work():
        events = engine.step()
        now = time.perf_counter()
        tokens = fresh = over = 0
        for event in events:
            tokens += len(event.token_ids)
            if waiting and event.token_ids and event.request_id in waiting:
                waiting.remove(event.request_id)
                fresh += 1
            over += event.finish_reason is not None
        timeline.tokens += tokens
        timeline.first += [now - begun] * fresh
        timeline.ended += [now - begun] * over
        if events and not fresh and len(events) >= running:
            timeline.steps.append(now - before)
        running = len(events) - over
        before = now
    timeline.seconds = before - begun
    expected = sum(request.new_tokens for request in requests)
    if timeline.tokens != expected:
        raise ValueError(f"the engine gave {timeline.tokens} tokens where {expected} were asked for.")
    return timeline


def milliseconds(seconds: float | None) -> float | str:
    """For a row: rounded to a ten-thousandth of a millisecond, empty for None."""
    return "" if seconds is None else round(seconds * 1e3, 4)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated; ValueError for no values."""
    if not values:
        raise ValueError("there are no values to take a percentile of.")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
