"""The events of one request on their way from an engine process to whoever iterates over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from engine.runtime.event import Event


class Stream:
    """The events of one request, to be iterated once. `close` aborts what is unfinished; it may be called any time."""

    def __init__(self, abort: Callable[[str], None], request_id: str) -> None:
        """`abort` ends the request of an id."""
        self.request_id = request_id
        self._abort = abort
        self._arrived: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        arrived = await self._arrived.get()
        if isinstance(arrived, Exception):
            self._over = True
            raise arrived
        self._over = arrived.finish_reason is not None
        return arrived

    def put(self, arrived: Event | Exception) -> None:
        self._arrived.put_nowait(arrived)

    def cut(self, latest: Event | None) -> None:
        """Abort the request and let the iteration end with an event that says so, after `latest`."""
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
        self._abort(self.request_id)

    def fail(self, error: Exception) -> None:
        """Abort the request and let the iteration end with `error`."""
        self.put(error)
        self._abort(self.request_id)

    def close(self) -> None:
        self._over = True
        self._abort(self.request_id)
