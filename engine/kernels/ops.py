# mypy: disable-error-code="no-any-return"
"""The operations of the decoder: Triton's kernels for tensors on a GPU; for all others plain torch, and compiled C for
the products of quantized linears.

Names and contracts are those of `reference.py`, where the single operations are, and of the fused ones below, which say
of which operations they are made. Triton is imported when the first tensor on a GPU arrives.
(Above 300 lines: one function an operation.)
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.kernels import cpu_linear, draw_reference, invariant, reference
from engine.kernels.reference import PagedQueries, Pages, causal_attention, unpack_int4

__all__ = [
    "add_rms_norm",
    "add_rms_norm_int8",
    "begin_step",
    "causal_attention",
    "dense_linear",
    "draw_tokens",
    "gated_int4_linear",
    "gated_int8_linear",
    "int4_linear",
    "int8_linear",
    "likeliest",
    "normed_int4_linear",
    "normed_int8_linear",
    "norms_in_int4_linear",
    "pack_int4",
    "packs_int4",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rms_norm_int8",
    "rope_attention",
    "rope_write_kv",
    "rounded_int8_linear",
    "row_maxima",
    "silu_and_mul",
    "silu_and_mul_int8",
    "unpack_int4",
]


# What the matrix kernels compute in.
HALVES = (torch.float16, torch.bfloat16)


class Steps(PagedQueries, Protocol):
    """What the kernels of attention need beside it: see `engine.models.batch.Batch`."""

    @property
    def decodes(self) -> int: ...
    @property
    def decode_lens(self) -> Tensor | None: ...
    @property
    def uneven(self) -> bool: ...
    @property
    def blocks(self) -> Tensor | None: ...
    @property
    def invariant(self) -> bool: ...
    @property
    def slots(self) -> Tensor: ...


@cache
def _kernels(name: str) -> Any:
    return importlib.import_module(f"engine.kernels.{name}")


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled here; without Triton a GPU runs plain torch."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def on_kernels(x: Tensor) -> bool:
    return x.is_cuda and has_triton()


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [..., in] and weight [out, in]; [..., out]."""
    if on_kernels(x) and x.dtype in HALVES:
        return _kernels("dense_linear").dense_linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def int8_linear(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.int8_linear`."""
    if on_kernels(x) and dtype in HALVES:
        return _kernels("int8_linear").int8_linear(x, x_scales, weight, weight_scales, bias, dtype)
    if cpu_linear.multiplies_int8(x, weight):
        return cpu_linear.int8_linear(x, x_scales, weight, weight_scales, bias, dtype)
    return reference.int8_linear(x, x_scales, weight, weight_scales, bias, dtype)


def rounded_int8_linear(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_linear` of what `quantize_rows` gives for x [T, in], in its type."""
    if on_kernels(x) and x.dtype in HALVES:
        return _kernels("normed_linear").rounded_int8_linear(x, weight, weight_scales, bias)
    return int8_linear(*quantize_rows(x), weight, weight_scales, bias, x.dtype)


def gated_int8_linear(
    gate_up: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, rotated: int = 0
) -> Tensor:
    """`int8_linear` of what `silu_and_mul_int8` gives for gate_up [T, 2 * in], in its type."""
    if on_kernels(gate_up) and gate_up.dtype in HALVES:
        return _kernels("normed_linear").gated_int8_linear(gate_up, weight, weight_scales, bias, rotated=rotated)
    return int8_linear(*silu_and_mul_int8(gate_up, rotated=rotated), weight, weight_scales, bias, gate_up.dtype)


def normed_int8_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`int8_linear` of what `add_rms_norm_int8` gives, in the type of delta, and the sum."""
    if on_kernels(delta) and delta.dtype in HALVES:
        return _kernels("normed_linear").normed_int8_linear(delta, residual, norm, eps, weight, weight_scales, bias)
    values, scales, total = add_rms_norm_int8(delta, residual, norm, eps)
    return int8_linear(values, scales, weight, weight_scales, bias, total.dtype), total


def packs_int4(qweight: Tensor, scales: Tensor, dtype: torch.dtype) -> bool:
    """Whether `int4_linear` computes in `dtype` on the device of these weights, which are in the AWQ layout."""
    if qweight.is_cuda:
        return on_kernels(qweight) and dtype in HALVES
    return cpu_linear.packs_int4(qweight, scales)


def pack_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Any:
    """The AWQ layout (see `reference.unpack_int4`) in the order of `int4_linear`, where `packs_int4` says so."""
    if qweight.is_cuda:
        return _kernels("int4_weights").Int4Weights.pack(qweight, qzeros, scales)
    return cpu_linear.CpuInt4Weights.pack(qweight, qzeros, scales)


def gated_int4_linear(x: Tensor, weights: Any, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up [..., out / 2] of the outputs x W^T + bias, gate's and up's `in_turns`: on a GPU alone."""
    return _kernels("int4_linear").gated_int4_linear(x, weights, bias)


def normed_int4_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weights: Any,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`int4_linear` or `gated_int4_linear` of what `add_rms_norm` gives, and the sum: on a GPU alone."""
    return _kernels("normed_linear").normed_int4_linear(delta, residual, norm, eps, weights, bias, gated=gated)


def norms_in_int4_linear(rows: int) -> bool:
    """Whether `normed_int4_linear` may be one kernel for so many rows."""
    return bool(rows <= _kernels("normed_linear").MOST_ROWS)


def int4_linear(x: Tensor, weights: Any, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [..., in] in a type of `packs_int4` and weights of `pack_int4`; [..., out]."""
    if x.is_cuda:
        return _kernels("int4_linear").int4_linear(x, weights, bias)
    return cpu_linear.int4_linear(x, weights, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    return _kernels("norm").rms_norm(x, weight, eps) if on_kernels(x) else reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of total = residual + x (rounded to the type of x), and total: both [T, hidden]."""
    if on_kernels(x):
        return _kernels("norm").add_rms_norm(x, residual, weight, eps)
    total = residual + x
    return reference.rms_norm(total, weight, eps), total


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.rms_norm_int8`."""
    if on_kernels(x):
        return _kernels("norm").rms_norm_int8(x, weight, eps)
    return reference.rms_norm_int8(x, weight, eps)


def add_rms_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.rms_norm_int8` of total = residual + x (rounded to the type of x), and total."""
    if on_kernels(x):
        return _kernels("norm").add_rms_norm_int8(x, residual, weight, eps)
    total = residual + x
    return *reference.rms_norm_int8(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_and_mul`."""
    return _kernels("activation").silu_and_mul(gate_up) if on_kernels(gate_up) else reference.silu_and_mul(gate_up)


def silu_and_mul_int8(gate_up: Tensor, maxima: Tensor | None = None, rotated: int = 0) -> tuple[Tensor, Tensor]:
    """`reference.silu_and_mul_int8`."""
    if on_kernels(gate_up):
        return _kernels("activation").silu_and_mul_int8(gate_up, maxima, rotated)
    return reference.silu_and_mul_int8(gate_up, maxima, rotated)


def quantize_rows(x: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`."""
    if on_kernels(x) and x.dim() == 2:
        return _kernels("activation").quantize_rows(x, maxima)
    return reference.quantize_rows(x, maxima)


def row_maxima(x: Tensor, *, gated: bool, rotated: int = 0) -> Tensor:
    """`reference.row_maxima`."""
    if on_kernels(x) and x.dim() == 2:
        return _kernels("activation").row_maxima(x, gated=gated, rotated=rotated)
    return reference.row_maxima(x, gated=gated, rotated=rotated)


def rope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_scale: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    pages: Pages,
    slots: Tensor,
    heads: int,
) -> Tensor:
    """Queries from qkv [T, (heads + 2 * kv_heads) * head_dim], whose K and V go into the pages at slots [T].

    Of `reference.py`: `rms_norm` of each head of Q and K where `head_norms` has the two weights, `apply_rope`, and
    `write_kv`. Returns [T, heads, head_dim].
    """
    if on_kernels(qkv) and can_read(pages):
        return _kernels("rope_write_kv").rope_write_kv(qkv, cos, sin, query_scale, head_norms, eps, pages, slots, heads)
    query, key, value = split_heads(qkv, heads, pages.key.shape[3])
    if head_norms is not None:
        query, key = (reference.rms_norm(x, w, eps) for x, w in zip((query, key), head_norms, strict=True))
    query, key = reference.apply_rope(query, key, cos, sin, query_scale)
    reference.write_kv(key, value, pages, slots)
    return query


def split_heads(qkv: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [T, their heads, head_dim] of qkv [T, (heads + 2 * kv_heads) * head_dim]."""
    whole = qkv.view(len(qkv), -1, head_dim)
    kv_heads = (whole.shape[1] - heads) // 2
    return whole[:, :heads], whole[:, heads : heads + kv_heads], whole[:, heads + kv_heads :]


def can_read(pages: Pages) -> bool:
    """Whether the kernels can read these pages: bytes lie in whole words."""
    return pages.key.dtype != torch.uint8 or pages.key.shape[3] % 4 == 0


def paged_attention(query: Tensor, pages: Pages, batch: Steps, scale: float, window: int | None = None) -> Tensor:
    """`reference.paged_attention`. On a GPU the first `batch.decodes` sequences have one token each, and
    `batch.blocks` names the tokens of the others. In a padded batch (with `decode_lens`) some of the first ones are no
    decoding sequences: their rows are zeros until the kernel of the blocks has written them."""
    if not (on_kernels(query) and can_read(pages)) or batch.blocks is None:
        attention = invariant.paged_attention if batch.invariant else reference.paged_attention
        return attention(query, pages, batch, scale, window)
    out = torch.empty_like(query)
    if batch.decodes:
        _kernels("decode_attention").decode_attention(
            query[: batch.decodes],
            pages,
            batch.context_lens[: batch.decodes] if batch.decode_lens is None else batch.decode_lens,
            batch.page_table[: batch.decodes],
            scale,
            window,
            out=out[: batch.decodes],
            uneven=batch.uneven,
        )
    if len(batch.blocks):
        _kernels("prefill_attention").prefill_attention(
            query, pages, batch.query_starts, batch.context_lens, batch.page_table, batch.blocks, scale, window, out=out
        )
    return out


def minds_lengths(pages: Pages, heads: int, sequences: int) -> bool:
    """Whether decode attention of so many sequences is another one where their contexts are of unequal lengths."""
    if not (on_kernels(pages.key) and can_read(pages)):
        return False
    minds: bool = _kernels("decode_attention").minds_lengths(pages, heads, sequences)
    return minds


def begin_step(
    token_ids: Tensor, drawn: Tensor | None, embedding: Tensor, positions: Tensor, frequencies: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.begin_step`."""
    kernels = _kernels("begin_step") if on_kernels(embedding) else reference
    return kernels.begin_step(token_ids, drawn, embedding, positions, frequencies, factor)


def likeliest(logits: Tensor, ignoring: Tensor, eos_token_ids: Tensor, out: Tensor, copy: Tensor | None = None) -> None:
    """`reference.likeliest`."""
    kernels = _kernels("likeliest") if on_kernels(logits) else reference
    kernels.likeliest(logits, ignoring, eos_token_ids, out, copy)


def rope_attention(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor, Tensor | None],
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    pages: Pages,
    batch: Steps,
    heads: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`rope_write_kv` (rope being cos, sin and query_scale) and `paged_attention`: [T, heads, head_dim].

    On a GPU one kernel does both where each sequence has one token and they are so few that contexts are split.
    """
    kernels = _kernels("decode_attention") if on_kernels(qkv) and can_read(pages) else None
    tokens, kv_heads = len(qkv), pages.key.shape[1]
    all_decode = batch.decodes == tokens and batch.decode_lens is None
    if kernels is not None and all_decode and kernels.splits_for(tokens, kv_heads, qkv.device) > 1:
        lens, table = batch.context_lens, batch.page_table
        given = pages, batch.slots, lens, table, heads, scale, window
        return kernels.rope_decode_attention(qkv, *rope, head_norms, eps, *given, uneven=batch.uneven)
    query = rope_write_kv(qkv, *rope, head_norms, eps, pages, batch.slots, heads)
    return paged_attention(query, pages, batch, scale, window)


def draw_tokens(logits: Tensor, numbers: Tensor) -> Tensor:
    """`draw_reference.draw_tokens`."""
    kernels = _kernels("draw") if on_kernels(logits) else draw_reference
    return kernels.draw_tokens(logits, numbers)
