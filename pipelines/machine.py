"""What this machine has free and how fast it computes, and what a piece of work really took."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(slots=True, kw_only=True)
class Used:
    """What a block of work took: bytes of memory at its worst moment above its start (of the GPU, where that computes),
    and seconds. Known when the block has ended."""

    memory: int = 0
    seconds: float = 0.0


def free_memory(device: str) -> int:
    """Bytes that can be had now: of a GPU, or of this machine within the limit of the control group that we are in."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = int(psutil.virtual_memory().available)
    return min([free, *_group_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def usable_processors(device: str) -> int:
    """How many samples go side by side (see `stream.side_by_side`)."""
    return len(os.sched_getaffinity(0)) if device == "cpu" and sys.platform == "linux" else 1


@functools.cache
def operations_a_second(device: str, workers: int, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations of products that `workers` reach together, seen in a moment."""
    size = 512 if device == "cpu" else 4096
    x = torch.randn(size, size, device=device).to(dtype)

    def seen(_: int) -> float:
        if device == "cpu":
            torch.set_num_threads(1)  # of this thread alone
        x @ x
        if device != "cpu":
            torch.cuda.synchronize()
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < 0.05:
            x @ x
            if device != "cpu":
                torch.cuda.synchronize()
            count += 1
        return count * 2.0 * size**3 / (time.perf_counter() - begun)

    if device != "cpu":
        return seen(0)
    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(seen, range(workers)))


@contextlib.contextmanager
def measured(device: str) -> Iterator[Used]:
    """Measure the block. Memory of a process is that of Linux; elsewhere it is that of the whole run."""
    used, begun, start = Used(), time.perf_counter(), _begin(device)
    yield used
    used.seconds = time.perf_counter() - begun
    used.memory = max(_peak(device) - start, 0)


def _begin(device: str) -> int:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes, 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _group_limits(root: Path, membership: Path) -> Iterator[int]:
    """What is left to the control group of this process and those around it (version 2), where they have a limit."""
    with contextlib.suppress(OSError, ValueError):
        own = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))
        folder = root / own.removeprefix("0::").lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):
                limit = int((group / "memory.max").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                taken = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
                yield max(limit - taken, 0)
