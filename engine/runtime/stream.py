"""The events of one request on their way from an engine process to whoever reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from engine.runtime.event import Event

MOST_WAITING = 64


class Stream:
    """The events of one request, to be read once: iterated over, or taken with `take` when `on_arrival` is called.

    A reader who is slow gets what has come meanwhile as one event, so that what waits for it is no more than the answer
    itself. Events with log-probabilities stay apart: which text belongs to which token is in how they come.
    `close` aborts what is unfinished; it may be called any time.
    """

    def __init__(self, abort: Callable[[str], None], request_id: str) -> None:
        """`abort` ends the request of an id. `error` is why the request failed, if it did. `on_arrival` is called when
        something has come: once for all streams that have the same, where it came at the same time."""
        self.request_id = request_id
        self.on_arrival: Callable[[], None] = self._wake
        self._abort = abort
        self._waiting: list[Event] = []
        self.error: Exception | None = None
        self._arrived = asyncio.Event()
        self._ended = False
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        while not self._waiting:
            if self.error is not None:
                self._over = True
                raise self.error
            self._arrived.clear()
            await self._arrived.wait()
        self._waiting = joined(self._waiting)
        event = self._waiting.pop(0)
        self._over = event.finish_reason is not None
        return event

    def take(self) -> list[Event]:
        """What has come and was not taken yet; then raises the error with which the request failed, if it did."""
        taken, self._waiting = joined(self._waiting), []
        if self.error is not None and not taken:
            raise self.error
        return taken

    @property
    def has_events(self) -> bool:
        """Whether there is something to `take`."""
        return bool(self._waiting)

    def put(self, event: Event) -> None:
        """News of the request, after which `on_arrival` is to be called; what comes after its end is dropped."""
        if not self._ended:
            self._ended = event.finish_reason is not None
            self._waiting.append(event)
            if len(self._waiting) % MOST_WAITING == 0:
                self._waiting = joined(self._waiting)

    def cut(self, latest: Event | None) -> None:
        """Abort the request and let it end with an event that says so, after `latest` or what waits already."""
        latest = self._waiting[-1] if self._waiting else latest
        counts = (latest.prompt_tokens, latest.cached_tokens, latest.completion_tokens) if latest else (0, 0, 0)
        self.put(
            Event(
                request_id=self.request_id,
                token_ids=(),
                text="",
                finish_reason="abort",
                prompt_tokens=counts[0],
                cached_tokens=counts[1],
                completion_tokens=counts[2],
            )
        )
        self._tell_and_abort()

    def fail(self, error: Exception) -> None:
        """Abort the request and let it end with `error`; the first error stays."""
        self.error = self.error or error
        self._tell_and_abort()

    def close(self) -> None:
        self._over = True
        self._abort(self.request_id)

    def _tell_and_abort(self) -> None:
        asyncio.get_running_loop().call_soon(self.on_arrival)
        self._abort(self.request_id)

    def _wake(self) -> None:
        self._arrived.set()


def joined(events: list[Event]) -> list[Event]:
    """The events in their order, each run of those without log-probabilities as one."""
    if len(events) < 2:
        return events
    runs: list[list[Event]] = []
    for event in events:
        if runs and not event.logprobs and not runs[-1][-1].logprobs:
            runs[-1].append(event)
        else:
            runs.append([event])
    return [run[0] if len(run) == 1 else _one(run) for run in runs]


def _one(run: list[Event]) -> Event:
    last = run[-1]
    return Event(
        request_id=last.request_id,
        token_ids=tuple(token for event in run for token in event.token_ids),
        text="".join(event.text for event in run),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        completion_tokens=last.completion_tokens,
        admitted=last.admitted,
    )
