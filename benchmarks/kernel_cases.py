"""Cases of the operations of the decoder, each the reference beside the Triton kernels that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_registry import Case, Setting, implementations, register
from benchmarks.random_weights import KV_REACH
from engine.kernels import reference
from engine.models.batch import Batch
from engine.models.cache import KVCache, KVPages, KVScales

PAGE_LEN = 64
PREFILL_TOKENS = 2048


@register("rms_norm")
def rms_norm(setting: Setting) -> Iterator[Case]:
    yield _norm(setting, "rms_norm", out_bytes=setting.dtype.itemsize, residual=False)


@register("rms_norm_int8")
def rms_norm_int8(setting: Setting) -> Iterator[Case]:
    yield _norm(setting, "rms_norm_int8", out_bytes=1, residual=False)


def _norm(setting: Setting, op: str, *, out_bytes: int, residual: bool) -> Case:
    tokens, hidden, item = setting.tokens, setting.config.hidden_size, setting.dtype.itemsize
    return Case(
        kernel=op,
        size=f"{tokens}x{hidden}",
        inputs=lambda: (values(setting, tokens, hidden), values(setting, hidden), setting.config.norm_eps),
        run=implementations(op, setting.device, "engine.kernels.norm"),
        bytes=tokens * hidden * (item + out_bytes) + hidden * item,
    )


@register("silu_and_mul")
def silu_and_mul(setting: Setting) -> Iterator[Case]:
    yield _silu(setting, "silu_and_mul", out_bytes=setting.dtype.itemsize)


@register("silu_and_mul_int8")
def silu_and_mul_int8(setting: Setting) -> Iterator[Case]:
    yield _silu(setting, "silu_and_mul_int8", out_bytes=1)


def _silu(setting: Setting, op: str, *, out_bytes: int) -> Case:
    tokens, inner = setting.tokens, setting.config.intermediate_size
    return Case(
        kernel=op,
        size=f"{tokens}x{2 * inner}",
        inputs=lambda: (values(setting, tokens, 2 * inner),),
        run=implementations(op, setting.device, "engine.kernels.activation"),
        bytes=tokens * inner * (2 * setting.dtype.itemsize + out_bytes),
    )


@register("apply_rope")
def apply_rope(setting: Setting) -> Iterator[Case]:
    config, tokens = setting.config, setting.tokens
    heads, width = config.num_heads + config.num_kv_heads, config.head_dim

    def inputs() -> tuple[Any, ...]:
        query, key = (values(setting, tokens, count, width) for count in (config.num_heads, config.num_kv_heads))
        angles = torch.rand(tokens, width // 2, device=setting.device)
        return query, key, angles.cos(), angles.sin()

    yield Case(
        kernel="apply_rope",
        size=f"{tokens}x{heads}x{width}",
        inputs=inputs,
        run=implementations("apply_rope", setting.device),
        bytes=2 * tokens * heads * width * setting.dtype.itemsize + tokens * width * 4,
    )


@register("write_kv")
def write_kv(setting: Setting) -> Iterator[Case]:
    config, tokens = setting.config, setting.tokens
    count = 2 * tokens * config.num_kv_heads * config.head_dim
    for kv in ("kv16", "kv8"):

        def inputs(kv: str = kv) -> tuple[Any, ...]:
            key, value = (values(setting, tokens, config.num_kv_heads, config.head_dim) for _ in range(2))
            slots = torch.randperm(-(-tokens // PAGE_LEN) * PAGE_LEN, device=setting.device)[:tokens]
            return key, value, _pages(setting, kv, -(-tokens // PAGE_LEN)), slots

        yield Case(
            kernel="write_kv",
            size=f"{tokens}x{config.num_kv_heads}x{config.head_dim} {kv}",
            inputs=inputs,
            run=implementations("write_kv", setting.device),
            bytes=count * (setting.dtype.itemsize + _kv_item(setting, kv)),
        )


@register("decode_attention")
def decode_attention(setting: Setting) -> Iterator[Case]:
    """One token a sequence over `context` cached ones; the seed's hot loop."""
    config, batch, context = setting.config, setting.tokens, setting.context
    row = config.num_kv_heads * config.head_dim
    scale = config.head_dim**-0.5

    def paged(query: Tensor, pages: KVPages, step: Batch) -> Tensor:
        return reference.paged_attention(query, pages, step, scale)

    run: dict[str, Callable[..., object]] = {"reference": paged}
    if setting.device.startswith("cuda"):
        run |= _triton_decode(scale)
    for kv in ("kv16", "kv8"):

        def inputs(kv: str = kv) -> tuple[Any, ...]:
            count = -(-context // PAGE_LEN)
            pages = _pages(setting, kv, batch * count)
            table = torch.randperm(batch * count, device=setting.device).view(batch, count).int()
            query = values(setting, batch, config.num_heads, config.head_dim)
            return query, pages, _decoding(table, batch, context, setting.device)

        yield Case(
            kernel="decode_attention",
            size=f"{batch}x{context} {config.num_heads}/{config.num_kv_heads} {kv}",
            inputs=inputs,
            run=run,
            bytes=2 * batch * context * row * _kv_item(setting, kv)
            + 2 * batch * config.num_heads * config.head_dim * setting.dtype.itemsize,
            operations=4 * batch * context * config.num_heads * config.head_dim,
            eager=("reference",),
        )


def _triton_decode(scale: float) -> dict[str, Callable[..., object]]:
    """The Triton kernel, which takes the lengths and the pages of a step by themselves."""
    found = implementations("decode_attention", "cuda", "engine.kernels.decode_attention")

    def of(kernel: Callable[..., object]) -> Callable[..., object]:
        return lambda query, pages, step: kernel(query, pages, step.context_lens, step.page_table, scale)

    return {name: of(kernel) for name, kernel in found.items()}


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


def values(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(shape, device=setting.device).to(setting.dtype)


def _kv_item(setting: Setting, kv: str) -> int:
    return 1 if kv == "kv8" else setting.dtype.itemsize


def _pages(setting: Setting, kv: str, num_pages: int) -> KVPages:
    """Pages of one layer, filled with values."""
    one = replace(setting.config, num_layers=1)
    scales = None
    if kv == "kv8":
        pairs = torch.zeros(1, one.num_kv_heads, 2)
        pairs[..., 0] = 2 * KV_REACH / 255
        scales = KVScales.of_heads(key=pairs, value=pairs, head_dim=one.head_dim)
    [pages] = KVCache(
        one, num_pages=num_pages, page_len=PAGE_LEN, device=setting.device, dtype=setting.dtype, scales=scales
    ).layers
    for stored in (pages.key, pages.value):
        if stored.dtype == torch.uint8:
            stored.random_(0, 256)
        else:
            stored.normal_()
    return pages


def _decoding(table: Tensor, batch: int, context: int, device: str) -> Batch:
    """A step of one token for each of `batch` sequences of `context` tokens, that one among them."""
    return Batch(
        token_ids=torch.zeros(batch, dtype=torch.int64, device=device),
        positions=torch.full((batch,), context - 1, dtype=torch.int64, device=device),
        query_starts=torch.arange(batch + 1, dtype=torch.int32, device=device),
        context_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        page_table=table,
        slots=table[:, (context - 1) // PAGE_LEN].long() * PAGE_LEN + (context - 1) % PAGE_LEN,
        logits_at=torch.arange(batch, device=device),
    )
