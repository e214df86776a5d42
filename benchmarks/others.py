"""What share of the processors was taken by others meanwhile: where it is large, a run measures them."""

from __future__ import annotations

import contextlib
import time

import psutil


class Others:
    """Counts from its making. Own is one process, this one unless another is named, with what descends from it; none of
    these may end before `share` is asked."""

    def __init__(self, own: psutil.Process | None = None) -> None:
        self._own = own or psutil.Process()
        self._begun, self._before = time.perf_counter(), self._seconds()

    def share(self) -> float:
        """Of the time of all processors since then: what others computed, other machines on the same host included as
        far as the system knows of them (steal). Between 0 and 1, to a hundredth of a second of a processor."""
        taken = self._seconds() - self._before
        whole = (time.perf_counter() - self._begun) * (psutil.cpu_count() or 1)
        return min(max(taken / whole, 0.0), 1.0)

    def _seconds(self) -> float:
        times = psutil.cpu_times()
        every = times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "steal", 0.0)
        return every - sum(_own_seconds(each) for each in (self._own, *self._own.children(recursive=True)))


def _own_seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0
