# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Causal attention of many new tokens a sequence over its pages, in Triton: one program a block of queries and head
(Dao 2023, FlashAttention-2, the forward pass)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.decode_attention import LOG2E
from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import INTERPRETER, facts
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, dequantized, places, pointers, read_rows, storage_of
from engine.kernels.reference import QUERY_BLOCK, Pages


def prefill_attention(
    query: Tensor,
    pages: Pages,
    query_starts: Tensor,
    context_lens: Tensor,
    page_table: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, causally, for the queries of `blocks`: query [T, heads, head_dim], as is out.

    `blocks` int32 [N, 2] names the work: sequence, and the first of at most QUERY_BLOCK of its queries. Rows of `out`
    that no block names are left as they are.
    """
    tokens, heads, head_dim = query.shape
    _, kv_heads, page_len, _ = pages.key.shape
    out = torch.empty_like(query) if out is None else out
    if not tokens or not len(blocks):
        return out
    wide = query.dtype == torch.float32
    _prefill[(len(blocks), heads)](
        query,
        *pointers(pages, query),
        query_starts,
        context_lens,
        page_table,
        blocks,
        out,
        page_table.stride(0),
        scale * LOG2E,
        window=window or 0,
        heads=heads,
        kv_heads=kv_heads,
        page_len=page_len,
        head_dim=head_dim,
        padded=max(triton.next_power_of_2(head_dim), 16),
        queries=QUERY_BLOCK,
        block=32 if wide or head_dim > 128 else 64,
        stored=storage_of(pages),
        stages=1 if wide or facts(query.device) == INTERPRETER else 3 if head_dim <= 128 else 2,
        num_warps=8,
        **options(facts(query.device)),
    )
    return out


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    query,
    key,
    value,
    key_scale,
    key_zero,
    value_scale,
    value_zero,
    key_steps,
    value_steps,
    query_starts,
    context_lens,
    page_table,
    blocks,
    out,
    table_stride,
    factor,
    window: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    padded: tl.constexpr,
    queries: tl.constexpr,
    block: tl.constexpr,
    stored: tl.constexpr,
    stages: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(1)
    kv_head = head // (heads // kv_heads)
    kind: tl.constexpr = query.dtype.element_ty
    sequence = tl.load(blocks + tl.program_id(0) * 2).to(tl.int64)
    first_query = tl.load(blocks + tl.program_id(0) * 2 + 1)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    length = tl.load(context_lens + sequence)
    column = tl.arange(0, padded)
    here = column < head_dim
    row = first_query + tl.arange(0, queries)
    mask = (row < count)[:, None] & here[None, :]
    at = ((start + row).to(tl.int64) * heads + head)[:, None] * head_dim + column[None, :]
    channel = kv_head * head_dim + column
    if PDL:
        depend()
    q = tl.load(query + at, mask=mask, other=0.0)
    reach = tl.full([queries], 1.0, tl.float32)
    if stored == CHANNELS:
        wide = q.to(tl.float32) * tl.load(key_scale + channel, mask=here, other=0.0)[None, :]
        reach = tl.max(tl.abs(wide), axis=1)
        reach = tl.where(reach > 0, reach, 1.0)
        q = (wide / reach[:, None]).to(kind)
    reach = reach * factor
    # The place of each query in its sequence, and the range of keys that this block sees.
    position = length - count + row
    end = tl.minimum(length - count + first_query + queries, length)
    oldest = 0
    if window:
        oldest = tl.maximum(length - count + first_query - window + 1, 0) // block * block
    table = page_table + sequence * table_stride
    best = tl.full([queries], float("-inf"), tl.float32)
    weight = tl.zeros([queries], tl.float32)
    acc = tl.zeros([queries, padded], tl.float32)
    # Blocks that all queries see whole need no mask: up to the first query's own place.
    whole = oldest
    if not window:
        whole = (length - count + first_query + 1) // block * block
    for first in tl.range(oldest, whole, block, num_stages=stages):
        token = first + tl.arange(0, block)
        place = places(table, first, token, kv_head, kv_heads, page_len, block)
        k, v = _keys_and_values(key, value, key_steps, value_steps, place, token < end, head_dim, padded, stored)
        score = tl.dot(q, tl.trans(k.to(kind)), input_precision="ieee")
        best, weight, acc = _attend(score, v, reach, best, weight, acc, kind, stored)
    for first in tl.range(whole, end, block, num_stages=stages):
        token = first + tl.arange(0, block)
        inside = token < end
        place = places(table, first, tl.minimum(token, end - 1), kv_head, kv_heads, page_len, block)
        k, v = _keys_and_values(key, value, key_steps, value_steps, place, inside, head_dim, padded, stored)
        score = tl.dot(q, tl.trans(k.to(kind)), input_precision="ieee")
        seen = inside[None, :] & (token[None, :] <= position[:, None])
        if window:
            seen = seen & (token[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        best, weight, acc = _attend(score, v, reach, best, weight, acc, kind, stored)
    o = acc / tl.where(weight > 0, weight, 1.0)[:, None]
    if stored == CHANNELS:
        scale = tl.load(value_scale + channel, mask=here, other=0.0)
        o = (o - 128.0) * scale[None, :] + tl.load(value_zero + channel, mask=here, other=0.0)[None, :]
    tl.store(out + at, o.to(kind), mask=mask)


@triton.jit
def _keys_and_values(key, value, key_steps, value_steps, place, inside, head_dim, padded, stored: tl.constexpr):
    """Rows of K and V [block, padded]: as computed, as bytes 0..255, or dequantized where tokens have steps."""
    k = read_rows(key, place, inside, head_dim, padded, stored == PLAIN)
    v = read_rows(value, place, inside, head_dim, padded, stored == PLAIN)
    if stored == TOKENS:
        k = dequantized(k, key_steps, place, inside)
        v = dequantized(v, value_steps, place, inside)
    return k, v


@triton.jit
def _attend(score, v, reach, best, weight, acc, kind: tl.constexpr, stored: tl.constexpr):
    """One block more of an online softmax over scores times `reach`."""
    highest = tl.maximum(best, tl.max(score, axis=1) * reach)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(score * reach[:, None] - shift[:, None])
    keep = tl.exp2(best - shift)
    rounded = p.to(kind)
    if stored == CHANNELS:  # the sum of the rounded weights: the offset of bytes then cancels exactly
        p = rounded.to(tl.float32)
    weight = weight * keep + tl.sum(p, axis=1)
    acc = acc * keep[:, None] + tl.dot(rounded, v.to(kind), input_precision="ieee")
    return highest, weight, acc
