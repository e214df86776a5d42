"""Finds the fastest configuration of decode attention on this GPU, for the table that serving reads.

A kernel that is started again and again hides its start, and what of the GPU idles while its last programs end, in the
launches beside it. In a layer nothing does: attention waits for the rotation before it, and what follows for all of
attention. So what is timed is a layer's rotation and write of K and V (in the same kernel where a configuration has it
so), attention and an RMS norm of what comes out, launched by dependent launch as a step does. Nothing is subtracted.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cases import CACHES, PAGE_LEN, pages_of, token_bytes
from benchmarks.kernel_registry import Setting
from engine.config import ModelConfig
from engine.kernels import decode_attention, norm, reference
from engine.kernels.page_rows import storage_of
from engine.kernels.rope_write_kv import rope_write_kv
from engine.kernels.tune import all_checked, microseconds, processes
from engine.kernels.tuning import UNEVEN, Config

# Sequences, their tokens on average (few tend to be long), and the sizes of the table that the result stands for.
CASES = ((1, 1024, (1, 2, 4, 8)), (16, 1024, (16, 32)), (64, 1024, (64,)), (256, 384, (128, 256, 512)))
# Caches that a measurement goes round, so that each is read from memory: at least, at most, and bytes of all that are
# several times what the L2 cache holds.
FEWEST, MOST, ROTATED_BYTES = 3, 64, 200_000_000
LAUNCHES = 12
# The standard deviation of the logarithm of contexts that are unequal.
SPREAD = 0.6
# A row of its own is for what takes less than this share of the time; each has graphs of its own.
CLEARLY = 0.97
# Contexts over which a configuration is checked, and the largest relative error of one: of its float16 values, and of
# sums by matrix instructions.
CHECKED = (1000, 272, 65, 17, 16, 1)
LARGEST_ERROR = 2e-3


def unequal(batch: int, mean: int) -> list[int]:
    """Log-normal lengths of about that mean, at even steps of probability, the longest first, as a step has them."""
    normal = NormalDist(-(SPREAD**2) / 2, SPREAD)
    steps = [normal.inv_cdf((i + 0.5) / batch) for i in reversed(range(batch))]
    return [max(1, round(mean * math.exp(step))) for step in steps]


@dataclass
class Layer:
    """What a decode step of sequences of `lens` tokens does about attention in one layer of a model, in float16, over
    `copies` caches by turns."""

    config: ModelConfig
    device: str
    kv: str
    lens: Sequence[int]
    copies: int | None = None  # None: as many as no cache of the device holds

    def __post_init__(self) -> None:
        config, batch = self.config, len(self.lens)
        one = {"group_size": 128, "device": self.device, "dtype": torch.float16}
        setting = Setting(config=config, tokens=batch, context=max(self.lens), **one)  # type: ignore[arg-type]
        lens = torch.tensor(self.lens)
        counts = -(-lens // PAGE_LEN)
        table = torch.zeros(batch, int(counts.max()), dtype=torch.int32)
        table[torch.arange(table.shape[1]) < counts[:, None]] = torch.randperm(int(counts.sum())).int()
        last = (lens - 1).clamp(min=0)
        slots = table.gather(1, (last // PAGE_LEN)[:, None]).long()[:, 0] * PAGE_LEN + last % PAGE_LEN
        self.query_starts = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
        self.context_lens = lens.int().to(self.device)
        self.page_table, self.slots = table.to(self.device), slots.to(self.device)
        fitting = ROTATED_BYTES // (sum(self.lens) * token_bytes(setting, self.kv))
        copies = self.copies or max(FEWEST, min(fitting, MOST))
        self.caches = [pages_of(setting, self.kv, int(counts.sum())) for _ in range(copies)]
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = torch.randn(batch, width, device=self.device).half()
        angles = torch.rand(batch, config.head_dim // 2, device=self.device)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.weight = torch.ones(config.num_heads * config.head_dim, dtype=torch.float16, device=self.device)
        self.scale = config.head_dim**-0.5
        kind = "one" if config.num_heads == config.num_kv_heads else "group"
        self.op = f"decode_{kind}_{storage_of(self.caches[0])}"

    def query(self, copy: int = 0) -> Tensor:
        """Rotated queries; their K and V are in the pages then."""
        pages = self.caches[copy % len(self.caches)]
        eps, heads = self.config.norm_eps, self.config.num_heads
        return rope_write_kv(self.qkv, self.cos, self.sin, None, None, eps, pages, self.slots, heads)

    def attend(self, copy: int, config: Config | None, splits: int | None = None) -> Tensor:
        """Rotation, write and attention as `ops.rope_attention` has them: [B, heads, head_dim]."""
        pages, lens, table = self.caches[copy % len(self.caches)], self.context_lens, self.page_table
        batch, kv_heads = len(self.qkv), pages.key.shape[1]
        if (splits or decode_attention.splits_for(batch, kv_heads, self.qkv.device)) == 1:
            query = self.query(copy)
            return decode_attention.decode_attention(
                query, pages, lens, table, self.scale, splits=splits, config=config
            )
        return decode_attention.rope_decode_attention(
            self.qkv,
            self.cos,
            self.sin,
            None,
            None,
            self.config.norm_eps,
            pages,
            self.slots,
            lens,
            table,
            self.config.num_heads,
            self.scale,
            splits=splits,
            config=config,
        )

    def run(self, copy: int, config: Config | None) -> Tensor:
        """The same and the norm."""
        return norm.rms_norm(self.attend(copy, config).flatten(1), self.weight, self.config.norm_eps)

    def microseconds(self, config: Config | None) -> float:
        return microseconds(lambda i: self.run(i, config), max(LAUNCHES, len(self.caches)))

    def error(self, config: Config | None, splits: int | None = None) -> float:
        """The largest relative error of a sequence over the first cache; infinite where a number is not finite."""
        exact = reference.paged_attention(self.query(), self.caches[0], self, self.scale).flatten(1).float()
        out = self.attend(0, config, splits).flatten(1).float()
        errors = (out - exact).norm(dim=1) / exact.norm(dim=1)
        return float(errors.max()) if bool(torch.isfinite(out).all()) else float("inf")


@functools.lru_cache(maxsize=4)
def _checked(config: ModelConfig, device: str, kv: str) -> Layer:
    return Layer(config, device, kv, CHECKED, copies=1)


def problem(config: ModelConfig, device: str, case: tuple[str, int, Config]) -> str | None:
    """What is wrong with a configuration over a kind of cache, where a batch is to be split so often; compiles it into
    the cache on disk, for the process that times."""
    kv, splits, tried = case
    try:
        error = _checked(config, device, kv).error(tried, tried.get("parts", splits))
    except Exception as problem:  # what a compiler or a launch says of one configuration
        return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
    return None if error < LARGEST_ERROR else f"error {error}"


def tune_attention(
    config: ModelConfig, device: str, *, seconds: float, report: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Rows of the table for the heads of a model: of each size the configuration that takes least over equal contexts,
    and a row of its own for unequal ones where another takes clearly less. What is not reached within `seconds` has
    none."""
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    kind = "one" if config.num_heads == config.num_kv_heads else "group"
    with processes() as pool:
        for batch, context, sizes in CASES:
            splits = decode_attention.splits_for(batch, config.num_kv_heads, torch.device(device))
            cases = [(kv, splits, tried) for kv in CACHES for tried in decode_attention.candidates(kind)]
            problems = all_checked(pool, functools.partial(problem, config, device), cases)
            for (kv, _, tried), wrong in zip(cases, problems, strict=True):
                if wrong:
                    report(f"decode_{kind} {batch}x{context} {kv} {tried}: {wrong}")
            for kv in CACHES:
                right = [case[2] for case, wrong in zip(cases, problems, strict=True) if case[0] == kv and not wrong]
                lengths = [[context] * batch, *([unequal(batch, context)] if batch > 1 else [])]
                layers = [Layer(config, device, kv, lens) for lens in lengths]
                timed: list[tuple[list[float], Config]] = []
                for tried in right:
                    if time.monotonic() < deadline:
                        timed.append(([layer.microseconds(tried) for layer in layers], tried))
                if not timed or len(timed) < len(right):
                    continue
                equal = min(timed, key=lambda each: each[0][0])
                found = [(layers[0].op, equal[0][0], equal[1])]
                other = min(timed, key=lambda each: each[0][-1])
                if other[0][-1] < CLEARLY * equal[0][-1]:
                    found.append((layers[0].op + UNEVEN, other[0][-1], other[1]))
                for op, us, best in found:
                    report(f"{op} {batch}x{context}: {us:.1f} us, {best}")
                    where = {"op": op, "n": config.num_kv_heads, "k": config.head_dim}
                    rows += [{**where, "m": size, "us": round(us, 2), "config": dict(best)} for size in sizes]
                del layers
                torch.cuda.empty_cache()
    return rows
