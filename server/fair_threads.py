"""Work that would hold up other answers, in threads: a few at a time, and callers take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

Made = TypeVar("Made")


class FairThreads:
    """Runs at most `most` functions at a time. Where more wait, owners come one after the other: whoever sends a flood
    delays another by what runs already, and by one function of each owner in line."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._limiter = anyio.CapacityLimiter(most)
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}

    async def run(self, owner: str, work: Callable[[], Made]) -> Made:
        """What `work` returns or raises."""
        await self._turn(owner)
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._pass_on()

    async def _turn(self, owner: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given in the moment in which nobody wanted it any more
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """The next turn, which is one of the owner whose last turn is longest ago."""
        while self._lines:
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            turn = line.popleft()
            if line:
                self._lines[owner] = line
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
