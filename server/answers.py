"""The answers to one HTTP request: one engine request for each, their events merged as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import Sampling
from engine.runtime.client import EngineClient
from engine.runtime.event import Event
from engine.runtime.stream import Stream
from server import shapes
from server.admission import Visit
from server.errors import DeadlineExceeded
from server.metrics import Metrics, Track
from server.traces import RequestTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer that is wanted. Jobs of the same `prompt` number share their prompt, which usage counts once."""

    prompt: int
    prompt_ids: Sequence[int]
    sampling: Sampling


class Answers:
    """Engine requests for `jobs`, numbered as they are. `close` aborts what is unfinished and may be called twice."""

    def __init__(self, jobs: Sequence[Job], visit: Visit, track: Track, trace: RequestTrace | None) -> None:
        self._jobs = jobs
        self._track = track
        self._trace = trace
        self._visit = visit
        self._timer: asyncio.TimerHandle | None = None
        self._late: DeadlineExceeded | None = None
        self._streams: list[Stream] = []
        self._unfinished = len(jobs)
        self._failed = False
        self._on_news: Callable[[], None] = _nobody_listens
        self._latest: dict[int, Event] = {}

    @classmethod
    async def open(
        cls,
        client: EngineClient,
        jobs: Sequence[Job],
        *,
        visit: Visit,
        metrics: Metrics,
        trace: RequestTrace | None = None,
        owner: str = "",
        priority: int = 0,
        seconds: float | None = None,
        until: float | None = None,
    ) -> Answers:
        """Submit all jobs, whose place in line is `visit`. ValueError, in the engine's words, when it refuses one; then
        none runs. When the loop's clock says `until`, which is after `seconds`, they end with DeadlineExceeded."""
        answers = cls(jobs, visit, metrics.track(len(jobs)), trace)
        if trace is not None:
            trace.begin(len(jobs))
        try:
            if seconds is not None and until is not None:
                answers._timer = asyncio.get_running_loop().call_at(until, answers._expire, seconds)
            for job in jobs:
                stream = await client.submit(job.prompt_ids, job.sampling, owner=owner, priority=priority)
                answers._streams.append(stream)
                stream.on_arrival = answers._tell
                if answers._late is not None:
                    raise answers._late
        except BaseException:
            answers.close()
            raise
        return answers

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._visit.close()
        self._track.close()
        if self._timer is not None:
            self._timer.cancel()
        self._on_news = _nobody_listens

    def _expire(self, seconds: float) -> None:
        self._late = DeadlineExceeded.after(seconds)
        for stream in self._streams:
            stream.fail(self._late)
        self._visit.close()

    def stop(self) -> None:
        """End what is unfinished here and now: its last event says "abort"."""
        for index, stream in enumerate(self._streams):
            latest = self._latest.get(index)
            if latest is None or latest.finish_reason is None:
                stream.cut(latest)

    def follow(self, on_news: Callable[[], None]) -> None:
        """Have `on_news` called when there may be more to `take`: once for all that comes at the same time."""
        self._on_news = on_news

    def take(self) -> list[tuple[int, Event]]:
        """(number of the answer, event) of all that has come since. Where that is nothing, the error of an answer that
        failed is raised (EngineError). A reader who is slow gets more at once."""
        batch: list[tuple[int, Event]] = []
        for index, stream in enumerate(self._streams):
            if stream.error is not None:
                if batch:
                    continue  # raised once what came before it was handed over
                self._failed = not stream.has_events
            for event in stream.take():
                self._latest[index] = event
                self._track.take(index, event)
                if self._trace is not None:
                    self._trace.take(index, event)
                if event.finish_reason is not None:
                    self._unfinished -= 1
                    self._visit.leave()
                batch.append((index, event))
        return batch

    @property
    def has_news(self) -> bool:
        """Whether there is something to `take`, or nothing will come any more."""
        return self.over or any(stream.error is not None or stream.has_events for stream in self._streams)

    @property
    def over(self) -> bool:
        """Whether nothing will come any more: the last event of each answer was taken, or an error raised."""
        return self._failed or not self._unfinished

    async def news(self) -> None:
        """Return when there may be something to `take`."""
        arrived = asyncio.Event()
        self.follow(arrived.set)
        if not self.has_news:
            await arrived.wait()

    def _tell(self) -> None:
        self._on_news()

    def usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's words."""
        firsts = {job.prompt: index for index, job in reversed(list(enumerate(self._jobs)))}
        prompts = [self._latest[index] for index in firsts.values() if index in self._latest]
        return shapes.usage(
            prompt_tokens=sum(event.prompt_tokens for event in prompts),
            completion_tokens=sum(event.completion_tokens for event in self._latest.values()),
            cached_tokens=sum(event.cached_tokens for event in prompts),
        )


def _nobody_listens() -> None:
    pass
