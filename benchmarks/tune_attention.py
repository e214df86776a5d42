"""Finds the fastest configuration of decode attention on this GPU, for the table that serving reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cases import CACHES, PAGE_LEN, pages_of
from benchmarks.kernel_registry import Setting
from engine.config import ModelConfig
from engine.kernels import decode_attention
from engine.kernels.page_rows import storage_of
from engine.kernels.tune import microseconds

# Sequences, the tokens of each (few tend to be long), and the sizes of the table that the result stands for.
CASES = ((1, 1024, (1, 2, 4, 8)), (16, 1024, (16, 32)), (64, 1024, (64,)), (256, 384, (128, 256, 512)))
# Caches that a measurement goes round, so that each is read from memory.
COPIES = 3


def tune_attention(
    config: ModelConfig, device: str, *, seconds: float, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Rows of the table for the heads of a model. What is not reached within `seconds` has none."""
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for batch, context, sizes in CASES:
        for kv in CACHES:
            found = list(_timed(config, device, kv, batch, context, deadline, report))
            if not found:
                continue
            us, op, best = min(found, key=lambda each: each[0])
            report(f"{op} {batch}x{context}: {us:.1f} us, {best}")
            where = {"op": op, "n": config.num_kv_heads, "k": config.head_dim}
            rows += [{**where, "m": size, "us": round(us, 2), "config": best} for size in sizes]
            torch.cuda.empty_cache()
    return rows


def _timed(
    config: ModelConfig,
    device: str,
    kv: str,
    batch: int,
    context: int,
    deadline: float,
    report: Callable[[str], None],
) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Microseconds of every configuration, the operation's name in the table, and the configuration."""
    setting = Setting(config=config, tokens=batch, context=context, group_size=128, device=device, dtype=torch.float16)
    count = -(-context // PAGE_LEN)
    table = torch.randperm(batch * count, device=device).view(batch, count).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    caches = [pages_of(setting, kv, batch * count) for _ in range(COPIES)]
    query = torch.randn(batch, config.num_heads, config.head_dim, device=device).half()
    kind = "one" if config.num_heads == config.num_kv_heads else "group"
    for tried in decode_attention.candidates(kind):
        if time.monotonic() > deadline:
            return

        def call(i: int, tried: Any = tried) -> Tensor:
            return decode_attention.decode_attention(
                query, caches[i % COPIES], lens, table, config.head_dim**-0.5, config=tried
            )

        try:
            yield microseconds(call, 4 * COPIES), f"decode_{kind}_{storage_of(caches[0])}", dict(tried)
        except Exception as problem:  # what a compiler or a launch says of one configuration
            report(f"decode_{kind} {batch}x{context} {tried}: {str(problem).splitlines()[0][:200]}")
