"""How long a kernel takes by itself: many launches over rotated inputs, so that they come from memory and not from a
cache, as one CUDA graph where that is possible."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Inputs are rotated over so many bytes: beyond the 50 MB of an H100's second cache, and a CPU's 32 MB.
ROTATED_BYTES = {"cpu": 2**26, "cuda": 400_000_000}
MOST_SETS = {"cpu": 8, "cuda": 64}
LEAST_LAUNCHES = 24
REPLAYS = 7
CPU_SECONDS = 0.2


def rotated(inputs: Callable[[], tuple[Any, ...]], size: int, device: str) -> list[tuple[Any, ...]]:
    """As many sets of inputs of `size` bytes as fill the caches, at least one and at most 64 (8 on a CPU)."""
    kind = torch.device(device).type
    return [inputs() for _ in range(max(1, min(-(-ROTATED_BYTES[kind] // max(size, 1)), MOST_SETS[kind])))]


def seconds_of(
    run: Callable[..., object], sets: Sequence[tuple[Any, ...]], device: str, *, eager: bool
) -> tuple[float, str]:
    """(seconds of one call, how it was timed): the median of seven rounds over all sets.

    `graph`: one CUDA graph of at least 24 calls; `stream`: the same calls one after the other, host time and all, for
    what is `eager` or cannot be captured; `cpu`: rounds until 0.2 seconds are over.
    """
    for arguments in sets[:2]:
        run(*arguments)
    if torch.device(device).type == "cpu":
        return _on_cpu(run, sets), "cpu"
    calls = [sets[index % len(sets)] for index in range(max(LEAST_LAUNCHES, len(sets)))]
    torch.cuda.synchronize(device)

    def once() -> None:
        for arguments in calls:
            run(*arguments)

    graph = None if eager else captured(once)
    if graph is None:
        return _of_stream(once) / len(calls), "stream"
    return _of_stream(graph.replay) / len(calls), "graph"


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """`work` as a CUDA graph; None where it does what a graph cannot hold, such as a copy from the host."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        # A capture that broke off leaves its own stream behind.
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None
    return graph


def _on_cpu(run: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> float:
    rounds: list[float] = []
    begun = time.perf_counter()
    while len(rounds) < REPLAYS or time.perf_counter() - begun < CPU_SECONDS:
        before = time.perf_counter()
        for arguments in sets:
            run(*arguments)
        rounds.append((time.perf_counter() - before) / len(sets))
        if time.perf_counter() - begun > 10 * CPU_SECONDS:
            break
    return statistics.median(rounds)


def _of_stream(work: Callable[[], object]) -> float:
    work()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
