"""Who may come in: a bounded number of requests of each key, and none while the server is ending."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable

from server.errors import RequestError

SHORTEST_WAIT, LONGEST_WAIT = 1, 60
KEPT_ENDS = 64


class Admission:
    """Counts the engine requests of each owner, waiting or running, up to `most`. What one key has in line never keeps
    another out."""

    def __init__(self, *, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.draining = False
        self._most = most
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._ends: dict[str, deque[float]] = {}
        self._changed = asyncio.Event()

    @property
    def held(self) -> int:
        """Engine requests that are waiting or running."""
        return self._held.total()

    def enter(self, owner: str, count: int) -> Visit:
        """Let `count` requests in. RequestError 429 with Retry-After where the owner has too many, 503 where the server
        is ending, 400 for more than could ever be let in."""
        if self.draining:
            raise RequestError(
                "This server is ending and takes no new requests.",
                status=503,
                code="server_ending",
                headers={"Retry-After": str(SHORTEST_WAIT)},
            )
        if count > self._most:
            raise RequestError(
                f"The request asks for {count} answers at once; this server takes up to {self._most} of one key.",
                param="n",
                code="invalid_value",
            )
        held = self._held[owner]
        if held + count > self._most:
            seconds = self.seconds_until(owner, held + count - self._most)
            raise RequestError(
                f"This key has {held} answers waiting or running, and this server takes up to {self._most}: try again "
                f"in {seconds} seconds.",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        self._held[owner] += count
        return Visit(self, owner, count)

    def seconds_until(self, owner: str, count: int) -> int:
        """Whole seconds until `count` more requests of an owner have ended, at the rate of its last KEPT_ENDS ends."""
        ends = self._ends.get(owner, deque())
        since = self._clock() - ends[0] if ends else 0.0
        if since <= 0:
            return SHORTEST_WAIT
        return max(SHORTEST_WAIT, min(LONGEST_WAIT, math.ceil(count * since / len(ends))))

    def leave(self, owner: str, count: int) -> None:
        self._held[owner] -= count
        if not self._held[owner]:
            del self._held[owner]
        ends = self._ends.setdefault(owner, deque(maxlen=KEPT_ENDS))
        ends.extend([self._clock()] * count)
        if not self._held:
            self._changed.set()

    async def drained(self) -> None:
        """Let nobody in any more, and return when all have left."""
        self.draining = True
        while self._held:
            self._changed.clear()
            await self._changed.wait()


class Visit:
    """The requests that were let in together. `close` is for all that have not left; it may be called twice."""

    def __init__(self, admission: Admission, owner: str, count: int) -> None:
        self._admission = admission
        self._owner = owner
        self._count = count

    def leave(self) -> None:
        """One request has ended."""
        if self._count:
            self._count -= 1
            self._admission.leave(self._owner, 1)

    def close(self) -> None:
        if count := self._count:
            self._count = 0
            self._admission.leave(self._owner, count)
