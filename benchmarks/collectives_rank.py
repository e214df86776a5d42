"""A rank of `ingot bench collectives`: `python -m benchmarks.collectives_rank`. All measure the same, in one order."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import shape
from engine.config import Recipe
from engine.kernels import ops
from engine.models import names
from engine.models.linear import Int8Linear
from engine.models.ranks import Ranks, leave
from engine.models.row_parallel import Int8RowParallel
from engine.runtime.channel import Channel, Message
from engine.runtime.rank_process import meet, run
from engine.runtime.share import rank_device
from engine.storage.rank_cuts import rank_config

CALLS, ROUNDS = 20, 7


def measure(task: Mapping[str, Any], ranks: Ranks, device: torch.device) -> list[dict[str, float]]:
    """Seconds of every exchange for each number of tokens of the task."""
    model = shape(task["shape"])
    part, dtype = rank_config(model, Recipe(weights="w8a8"), ranks.size), getattr(torch, task["dtype"])
    shared = Int8RowParallel(Int8Linear(torch.empty(0), torch.empty(0)), ranks)

    def ones(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.ones(size, dtype=of, device=device)

    found = []
    for tokens in task["tokens"]:
        hidden, maxima = ones(tokens, model.hidden_size), ones(tokens, of=torch.float32)
        logits, drawn = ones(tokens, -(-model.vocab_size // ranks.size)), ones(tokens, of=torch.int64)
        hidden.zero_()  # sums of sums stay finite
        seconds = {
            "sum": seconds_of(partial(ranks.sum, hidden), device),
            "maxima": seconds_of(partial(ranks.max, maxima), device),
            "logits": seconds_of(partial(ranks.gather, logits), device),
            "drawn": seconds_of(partial(ranks.share, drawn), device),
        }
        attended, gate_up = (
            torch.randn(tokens, width, device=device).to(dtype)
            for width in (names.linear_shape(part, names.OUTPUT)[1], 2 * names.linear_shape(part, names.DOWN)[1])
        )
        seconds["o_rows"] = seconds_of(partial(shared.rows, attended), device)
        seconds["own_o_rows"] = seconds_of(partial(ops.quantize_rows, attended), device)
        seconds["down_rows"] = seconds_of(partial(shared.rows, gate_up, gated=True), device)
        seconds["own_down_rows"] = seconds_of(partial(ops.silu_and_mul_int8, gate_up), device)
        found.append(seconds)
    return found


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call that all ranks make equally often; on a GPU within a CUDA graph."""

    def many() -> None:
        for _ in range(CALLS):
            call()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work: Callable[[], object] = many
    call()
    wait()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            many()
        work = graph.replay
    work()
    times = []
    for _ in range(ROUNDS):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        times.append((time.perf_counter() - begun) / CALLS)
    return statistics.median(times)


def work(task: Message, channel: Channel) -> None:
    device = torch.device(rank_device(task["device"], task["rank"], task["size"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    channel.send({"type": "loaded"})
    meet(task, device)
    measure(task, Ranks(task["rank"], task["size"]), device)
    [end] = channel.receive(wait=True)
    if end["leave"]:
        leave()


if __name__ == "__main__":
    sys.exit(run(work))
