"""Decode attention of one batch as `ingot bench attention` times it: inputs, and each form beside the proven one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.attention_cases import PAGE_LEN, pages_of, token_bytes
from benchmarks.attention_forms import Way
from benchmarks.kernel_registry import Setting
from engine.config import ModelConfig
from engine.kernels import decode_attention as forms
from engine.kernels import tune
from engine.kernels.decode_attention import decode_attention, rope_decode_attention
from engine.kernels.device import facts
from engine.kernels.page_rows import storage_of
from engine.kernels.rope_write_kv import rope_write_kv
from engine.kernels.tuning import Config
from engine.models.cache import KVPages

# Caches that a measurement goes round: beyond an H200's second cache, and at least three.
ROTATED_BYTES = 200_000_000
LAUNCHES = 12
REPLAYS = 3
# |y - split's y| / |split's y| that rounding does not explain.
WRONG = 1e-2


class Case:
    """Queries, caches and page tables of one batch; `bytes` are those of K and V."""

    def __init__(self, config: ModelConfig, device: str, kv: str, lens: Sequence[int], rotated: int = ROTATED_BYTES):
        batch, dtype = len(lens), torch.float16
        setting = Setting(config=config, tokens=batch, context=0, group_size=128, device=device, dtype=dtype)
        counts = [-(-length // PAGE_LEN) for length in lens]
        order = torch.randperm(sum(counts), device=device).int()
        table = torch.zeros(batch, max(counts), dtype=torch.int32, device=device)
        for row, pages in zip(table, torch.split(order, counts), strict=True):
            row[: len(pages)] = pages
        self.bytes = sum(lens) * token_bytes(setting, kv)
        self.caches: list[KVPages] = [
            pages_of(setting, kv, sum(counts)) for _ in range(min(64, max(3, -(-rotated // self.bytes))))
        ]
        last = torch.tensor(lens, device=device) - 1
        pages_of_last = table.gather(1, (last // PAGE_LEN)[:, None])[:, 0]
        self.slots = pages_of_last.long() * PAGE_LEN + last % PAGE_LEN
        self.lens, self.table = torch.tensor(lens, dtype=torch.int32, device=device), table
        self.heads, self.kind = config.num_heads, "one" if config.num_heads == config.num_kv_heads else "group"
        self.kv_heads, self.head_dim, self.eps = config.num_kv_heads, config.head_dim, config.norm_eps
        width = config.head_dim
        self.qkv = torch.randn(batch, (config.num_heads + 2 * config.num_kv_heads) * width, device=device).to(dtype)
        self.query = self.qkv[:, : config.num_heads * width].reshape(batch, config.num_heads, width).contiguous()
        angles = torch.rand(batch, width // 2, device=device)
        self.rope = angles.cos(), angles.sin(), None, None, config.norm_eps
        self.stored = storage_of(self.caches[0])
        self.split_once = forms.splits_for(batch, self.kv_heads, torch.device(device)) == 1

    def alone(self, config: Config, i: int) -> Tensor:
        pages = self.caches[i % len(self.caches)]
        return decode_attention(self.query, pages, self.lens, self.table, self.head_dim**-0.5, config=config)

    def turned(self, config: Config, i: int) -> Tensor:
        """With rotation: by one kernel in the walking form, and where contexts are split."""
        pages, scale = self.caches[i % len(self.caches)], self.head_dim**-0.5
        if config.get("form") == "walk" or not self.split_once:
            where = self.slots, self.lens, self.table, self.heads, scale
            return rope_decode_attention(self.qkv, *self.rope, pages, *where, config=config)
        query = rope_write_kv(self.qkv, *self.rope, pages, self.slots, self.heads)
        return decode_attention(query, pages, self.lens, self.table, scale, config=config)

    def proven(self) -> Config:
        """What the table or its default says, where that is not the walking form; else that form's plainest."""
        device = facts(self.query.device)
        found = forms.config_for(device, self.kind, self.stored, self.kv_heads, self.head_dim, len(self.lens))
        return forms.candidates(self.kind)[0] if found.get("form") == "walk" else found

    def ways(self, report: Callable[[str], None]) -> Iterator[Way]:
        """The proven form, then the walking one by each of its candidates that gives the same."""
        proven = self.proven()
        turned = self.turned(proven, 0)  # first, since it writes the newest token
        alone = self.alone(proven, 0)
        yield Way("split", proven, self._time(self.alone, proven), self._time(self.turned, proven))
        for tried in forms.walking(self.kind, self.stored):
            try:
                wrong = max(differ(self.alone(tried, 0), alone), differ(self.turned(tried, 0), turned))
                if wrong < WRONG:
                    yield Way("walk", tried, self._time(self.alone, tried), self._time(self.turned, tried))
                else:
                    report(f"WRONG by {wrong:.1e}: {len(self.lens)} sequences, {self.stored}, {tried}")
            except Exception as problem:  # what a compiler or a launch says of one configuration
                report(f"FAILED: {self.stored} {tried}: {str(problem).splitlines()[0][:200]}")

    def _time(self, run: Callable[[Config, int], Tensor], config: Config) -> float:
        launches = max(LAUNCHES, len(self.caches))
        return tune.microseconds(lambda i: run(config, i), launches, REPLAYS)


def differ(found: Tensor, expected: Tensor) -> float:
    """Relative, over the whole; infinite where something is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf
