"""The answers to one HTTP request: one engine request for each, their events merged as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import Sampling
from engine.runtime.client import EngineClient
from engine.runtime.event import Event
from engine.runtime.stream import Stream
from server import shapes
from server.admission import Admission, Visit
from server.errors import DeadlineExceeded
from server.metrics import Metrics, Track


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer that is wanted. Jobs of the same `prompt` number share their prompt, which usage counts once."""

    prompt: int
    prompt_ids: Sequence[int]
    sampling: Sampling


class Answers:
    """Engine requests for `jobs`, numbered as they are. `close` aborts what is unfinished and may be called twice."""

    def __init__(self, jobs: Sequence[Job], visit: Visit, track: Track) -> None:
        self._jobs = jobs
        self._track = track
        self._visit = visit
        self._timer: asyncio.TimerHandle | None = None
        self._late: DeadlineExceeded | None = None
        self._streams: list[Stream] = []
        self._latest: dict[int, Event] = {}

    @classmethod
    async def open(
        cls,
        client: EngineClient,
        jobs: Sequence[Job],
        *,
        admission: Admission,
        metrics: Metrics,
        owner: str = "",
        priority: int = 0,
        seconds: float | None = None,
    ) -> Answers:
        """Submit all jobs. ValueError, in the engine's words, when it refuses one, RequestError where there are too
        many of this owner already; then none runs. After `seconds` they end with DeadlineExceeded."""
        answers = cls(jobs, admission.enter(owner, len(jobs)), metrics.track(len(jobs)))
        try:
            if seconds is not None:
                answers._timer = asyncio.get_running_loop().call_later(seconds, answers._expire, seconds)
            for job in jobs:
                stream = await client.submit(job.prompt_ids, job.sampling, owner=owner, priority=priority)
                answers._streams.append(stream)
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

    def _expire(self, seconds: float) -> None:
        self._late = DeadlineExceeded(f"The answer took longer than the {seconds:g} seconds that it may take.")
        for stream in self._streams:
            stream.fail(self._late)
        self._visit.close()

    def stop(self) -> None:
        """End what is unfinished here and now: its last event says "abort"."""
        for index, stream in enumerate(self._streams):
            latest = self._latest.get(index)
            if latest is None or latest.finish_reason is None:
                stream.cut(latest)

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """(number of the answer, event) of all answers until each is finished."""
        arrived: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(stream, index, arrived)) for index, stream in enumerate(self._streams)]
        unfinished = len(pumps)
        try:
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                index, event = item
                self._latest[index] = event
                self._track.take(index, event)
                if event.finish_reason is not None:
                    unfinished -= 1
                    self._visit.leave()
                yield index, event
        finally:
            for pump in pumps:
                pump.cancel()
            self.close()

    def usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's words."""
        firsts = {job.prompt: index for index, job in reversed(list(enumerate(self._jobs)))}
        prompts = [self._latest[index] for index in firsts.values() if index in self._latest]
        return shapes.usage(
            prompt_tokens=sum(event.prompt_tokens for event in prompts),
            completion_tokens=sum(event.completion_tokens for event in self._latest.values()),
            cached_tokens=sum(event.cached_tokens for event in prompts),
        )


async def _pump(stream: Stream, index: int, arrived: asyncio.Queue[tuple[int, Event] | Exception]) -> None:
    try:
        async for event in stream:
            arrived.put_nowait((index, event))
    except Exception as error:
        arrived.put_nowait(error)
