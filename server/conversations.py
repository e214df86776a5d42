"""Conversations that the server keeps between requests, for clients of LMDeploy's /v1/chat/interactive.

What is kept is text; K and V are in the engine's prefix cache, or are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server.errors import RequestError

Turn = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Conversation:
    """`stop` ends the round that runs; None between rounds. `tokens` is what the turns came to in the last round."""

    turns: list[Turn] = field(default_factory=list)
    tokens: int = 0
    stop: Callable[[], None] | None = None
    busy: bool = False
    used: float = 0.0


class Conversations:
    """Conversations by owner and number: nobody reaches those of another. An idle one is forgotten after `timeout`
    seconds, and the one of an owner that was unused for longest when it has more than `most`."""

    def __init__(self, *, timeout: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = timeout
        self._most = most
        self._clock = clock
        self._owners: dict[str, dict[int, Conversation]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._owners.values()))

    def begin(self, owner: str, number: int, *, renew: bool) -> Conversation:
        """The conversation, for a round that `finish` ends; begun where it is not known. RequestError 409 while another
        round of it runs."""
        self._forget_old()
        known = self._owners.setdefault(owner, {})
        found = known.pop(number, None) or Conversation()
        known[number] = found
        if found.busy:
            raise RequestError(
                f"Session {number} is answering: wait for its answer, or stop it with 'stop': true.",
                status=409,
                param="session_id",
                code="session_busy",
            )
        if renew:
            found.turns, found.tokens = [], 0
        found.busy, found.used = True, self._clock()
        idle = [key for key, each in known.items() if not each.busy]
        for key in idle[: max(0, len(known) - self._most)]:
            del known[key]
        return found

    def finish(self, owner: str, number: int, *, keep: bool) -> None:
        """A round is over."""
        known = self._owners.get(owner, {})
        if (found := known.get(number)) is not None:
            found.busy, found.stop, found.used = False, None, self._clock()
            if not keep:
                del known[number]

    def stop(self, owner: str, number: int) -> None:
        """End the round that runs. RequestError 404 for a conversation that there is not."""
        self._forget_old()
        found = self._owners.get(owner, {}).get(number)
        if found is None:
            raise RequestError(
                f"There is no session {number}: it has ended, or was idle for {self._timeout:g} seconds.",
                status=404,
                param="session_id",
                code="session_not_found",
            )
        if found.stop is not None:
            found.stop()

    def _forget_old(self) -> None:
        oldest = self._clock() - self._timeout
        for owner, known in list(self._owners.items()):
            for number in [number for number, each in known.items() if not each.busy and each.used < oldest]:
                del known[number]
            if not known:
                del self._owners[owner]
