"""The time that calls of given methods take, added up, while everything else runs as it does."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self


class Stopwatch:
    """A context in which `methods`, pairs of a class and the name of one, are timed; a call within another counts once.

    `seconds` have passed in them by `clock`. Names that a class does not have are passed over. Not for threads that
    call them side by side.
    """

    def __init__(self, methods: Sequence[tuple[type, str]], *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._clock = clock
        self._depth = 0
        self._methods = [(owner, name) for owner, name in methods if hasattr(owner, name)]
        self._originals: list[tuple[type, str, Any, bool]] = []

    def __enter__(self) -> Self:
        for owner, name in self._methods:
            self._originals.append((owner, name, getattr(owner, name), name in vars(owner)))
            setattr(owner, name, self._timed(getattr(owner, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner, name, original, own in reversed(self._originals):
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)
        self._originals.clear()

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            begun = self._clock()
            try:
                return method(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += self._clock() - begun
                    self.calls += 1

        return timed
