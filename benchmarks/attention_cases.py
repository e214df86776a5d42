"""Cases of attention: rotary embedding and the KV write, decode and prefill over pages, and whole prompts without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_registry import Case, Setting, implementations, register, values
from benchmarks.random_weights import KV_REACH
from engine.kernels import reference
from engine.models.batch import QUERY_BLOCK, Batch
from engine.models.cache import KVCache, KVPages, KVScales, PerToken, page_bytes

PAGE_LEN = 64
# As computed; int8 with a scale and zero point a channel; int8 with those of every token and head.
CACHES = ("kv16", "kv8", "kv8-token")
PREFILL_TOKENS = 2048


@register("rope_write_kv")
def rope_write_kv(setting: Setting) -> Iterator[Case]:
    """q, k and v of a step: rotary embedding, and K and V into the pages."""
    config, tokens = setting.config, setting.tokens
    heads, width = config.num_heads + 2 * config.num_kv_heads, config.head_dim
    query_bytes = 2 * tokens * config.num_heads * width * setting.dtype.itemsize

    def plain(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        _scale: None,
        _norms: None,
        _eps: float,
        pages: KVPages,
        slots: Tensor,
        *_: int,
    ) -> Tensor:
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        query, key, value = torch.split(qkv.view(tokens, heads, width), sizes, dim=1)
        query, key = reference.apply_rope(query, key, cos, sin)
        reference.write_kv(key, value, pages, slots)
        return query

    for kv in CACHES:

        def inputs(kv: str = kv) -> tuple[Any, ...]:
            angles = torch.rand(tokens, width // 2, device=setting.device)
            slots = torch.randperm(-(-tokens // PAGE_LEN) * PAGE_LEN, device=setting.device)[:tokens]
            pages = pages_of(setting, kv, -(-tokens // PAGE_LEN))
            qkv = values(setting, tokens, heads * width)
            return qkv, angles.cos(), angles.sin(), None, None, config.norm_eps, pages, slots, config.num_heads

        yield Case(
            kernel="rope_write_kv",
            size=f"{tokens}x{heads}x{width} {kv}",
            inputs=inputs,
            run={"reference": plain} | implementations("rope_write_kv", setting.device, "engine.kernels.rope_write_kv"),
            bytes=query_bytes
            + 2 * tokens * config.num_kv_heads * width * setting.dtype.itemsize
            + tokens * token_bytes(setting, kv)
            + tokens * width * 4,
        )


@register("decode_attention")
def decode_attention(setting: Setting) -> Iterator[Case]:
    """One token a sequence over `context` cached ones; the seed's hot loop."""
    config, batch, context = setting.config, setting.tokens, setting.context
    scale = config.head_dim**-0.5

    def plain(query: Tensor, pages: KVPages, step: Batch) -> Tensor:
        return reference.paged_attention(query, pages, step, scale)

    def of(kernel: Callable[..., object]) -> Callable[..., object]:
        return lambda query, pages, step: kernel(query, pages, step.context_lens, step.page_table, scale)

    found = implementations("decode_attention", setting.device, "engine.kernels.decode_attention")
    for kv in CACHES:

        def inputs(kv: str = kv) -> tuple[Any, ...]:
            count = -(-context // PAGE_LEN)
            table = torch.randperm(batch * count, device=setting.device).view(batch, count).int()
            query = values(setting, batch, config.num_heads, config.head_dim)
            return query, pages_of(setting, kv, batch * count), _step(table, [1] * batch, context, setting.device)

        yield Case(
            kernel="decode_attention",
            size=f"{batch}x{context} {config.num_heads}/{config.num_kv_heads} {kv}",
            inputs=inputs,
            run={"reference": plain} | {name: of(kernel) for name, kernel in found.items()},
            bytes=batch * context * token_bytes(setting, kv)
            + 2 * batch * config.num_heads * config.head_dim * setting.dtype.itemsize,
            operations=4 * batch * context * config.num_heads * config.head_dim,
            eager=("reference",),
        )


@register("prefill_attention")
def prefill_attention(setting: Setting) -> Iterator[Case]:
    """The last tokens of one sequence, as many as a step has, over pages of `context` tokens more."""
    config, tokens = setting.config, min(setting.tokens, PREFILL_TOKENS)
    if tokens < 2:
        return
    length, scale = setting.context + tokens, config.head_dim**-0.5

    def plain(query: Tensor, pages: KVPages, step: Batch) -> Tensor:
        return reference.paged_attention(query, pages, step, scale)

    def of(kernel: Callable[..., object]) -> Callable[..., object]:
        return lambda query, pages, step: kernel(
            query, pages, step.query_starts, step.context_lens, step.page_table, step.blocks, scale
        )

    found = implementations("prefill_attention", setting.device, "engine.kernels.prefill_attention")
    for kv in CACHES[:2]:

        def inputs(kv: str = kv) -> tuple[Any, ...]:
            count = -(-length // PAGE_LEN)
            table = torch.randperm(count, device=setting.device).view(1, count).int()
            query = values(setting, tokens, config.num_heads, config.head_dim)
            return query, pages_of(setting, kv, count), _step(table, [tokens], length, setting.device)

        yield Case(
            kernel="prefill_attention",
            size=f"{tokens} after {setting.context} {config.num_heads}/{config.num_kv_heads} {kv}",
            inputs=inputs,
            run={"reference": plain} | {name: of(kernel) for name, kernel in found.items()},
            bytes=length * token_bytes(setting, kv)
            + 2 * tokens * config.num_heads * config.head_dim * setting.dtype.itemsize,
            operations=4 * (tokens * setting.context + tokens * (tokens + 1) // 2) * config.num_heads * config.head_dim,
            eager=("reference",),
        )


@register("causal_attention")
def causal_attention(setting: Setting) -> Iterator[Case]:
    """A whole prompt without a cache: the prompt has as many tokens as a step, up to 2048."""
    config, tokens = setting.config, min(setting.tokens, PREFILL_TOKENS)
    if tokens < 2:
        return
    width = config.num_heads + 2 * config.num_kv_heads
    starts = torch.tensor([0, tokens], dtype=torch.int32)

    def inputs() -> tuple[Any, ...]:
        query, key, value = (
            values(setting, tokens, count, config.head_dim)
            for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        )
        return query, key, value, starts, config.head_dim**-0.5

    yield Case(
        kernel="causal_attention",
        size=f"1x{tokens} {config.num_heads}/{config.num_kv_heads}",
        inputs=inputs,
        run=implementations("causal_attention", setting.device),
        bytes=tokens * (width + config.num_heads) * config.head_dim * setting.dtype.itemsize,
        operations=2 * tokens * (tokens + 1) * config.num_heads * config.head_dim,
    )


def pages_of(setting: Setting, kv: str, num_pages: int) -> KVPages:
    """Pages of one layer, filled with values."""
    one = replace(setting.config, num_layers=1)
    scales: KVScales | PerToken | None = None
    if kv == "kv8":
        pairs = torch.zeros(1, one.num_kv_heads, 2)
        pairs[..., 0] = 2 * KV_REACH / 255
        scales = KVScales.of_heads(key=pairs, value=pairs, head_dim=one.head_dim)
    elif kv == "kv8-token":
        scales = PerToken()
    [pages] = KVCache(
        one, num_pages=num_pages, page_len=PAGE_LEN, device=setting.device, dtype=setting.dtype, scales=scales
    ).layers
    for stored in (pages.key, pages.value):
        if stored.dtype == torch.uint8:
            stored.random_(0, 256)
        else:
            stored.normal_()
    for steps in (pages.key_steps, pages.value_steps):
        if steps is not None:
            steps[..., 0] = 2 * KV_REACH / 255
    return pages


def token_bytes(setting: Setting, kv: str) -> int:
    """K and V of one token in one layer, as the cache keeps them."""
    one = replace(setting.config, num_layers=1)
    return page_bytes(one, page_len=1, dtype=setting.dtype, quantized=kv != "kv16", per_token=kv == "kv8-token")


def _step(table: Tensor, new: list[int], context: int, device: str) -> Batch:
    """A step of `new` tokens for each sequence of `context` tokens, those among them: all one, or one sequence."""
    batch, total = len(new), sum(new)
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(new).cumsum(0)
    decodes = batch if new[0] == 1 else 0
    blocks = [] if decodes else [(0, first) for first in range(0, new[0], QUERY_BLOCK)]
    places = torch.arange(context - new[0], context, device=device)
    slots = table[:, places // PAGE_LEN].long() * PAGE_LEN + places % PAGE_LEN
    return Batch(
        token_ids=torch.zeros(total, dtype=torch.int64, device=device),
        positions=places.repeat(batch),
        query_starts=starts.to(device),
        context_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        page_table=table,
        slots=slots.flatten(),
        logits_at=torch.arange(batch, device=device),
        decodes=decodes,
        blocks=torch.tensor(blocks, dtype=torch.int32).view(-1, 2).to(device),
    )
