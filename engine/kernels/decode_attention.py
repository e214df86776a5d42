# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Attention of one new token a sequence over its pages, in Triton.

A program takes one part ("split") of one sequence's context for one KV head and all query heads that read it; the last
program of a head to end joins the parts, from first to last, so that the result does not depend on who that is. Scales
of channels stay outside the loop over tokens: those of K go into the query, those of V into the result, and a zero
point of K moves all scores alike, which changes no softmax.
(Above 300 lines: both kernels are here, since they are two forms of one computation.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import INTERPRETER, facts
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, dequantized, places, pointers, read_rows, storage_of
from engine.kernels.reference import Pages
from engine.kernels.splits import TILES, buffers

LOG2E = 1.4426950408889634
# Programs per multiprocessor that keep the memory busy; a batch with fewer is split further.
WAVES = 2
MOST_SPLITS = 32


def splits_for(batch: int, kv_heads: int, device: torch.device) -> int:
    """Into how many parts the context of each sequence is cut: a function of the batch's size, not of its lengths, so
    that a captured graph stays right as the sequences grow."""
    wanted = WAVES * facts(device).multiprocessors // max(batch * kv_heads, 1)
    return max(1, min(1 << (wanted.bit_length() - 1) if wanted else 1, MOST_SPLITS))


def decode_attention(
    query: Tensor,
    pages: Pages,
    context_lens: Tensor,
    page_table: Tensor,
    scale: float,
    window: int | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for one token a sequence: query [B, heads, head_dim] -> the same shape.

    The last token of `context_lens` [B] is the query's own, whose K and V are in the pages already. A sequence of 0
    tokens gets zeros.
    """
    batch, heads, head_dim = query.shape
    _, kv_heads, page_len, _ = pages.key.shape
    group = heads // kv_heads
    out = torch.empty_like(query) if out is None else out
    if not batch:
        return out
    splits = splits or splits_for(batch, kv_heads, query.device)
    splits = splits if batch * kv_heads <= TILES else 1
    partial, sums, arrivals = out, out, out
    if splits > 1:
        _, arrivals = buffers(query.device)
        partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device)
    padded = triton.next_power_of_2(head_dim)
    one_row = group == 1
    block = 32 if one_row else 64
    kernel = _decode_one if one_row else _decode_group
    rows = {} if one_row else {"rows": max(triton.next_power_of_2(group), 16)}
    stored = storage_of(pages)
    kernel[(splits, kv_heads, batch)](
        query,
        *pointers(pages, query),
        context_lens,
        page_table,
        out,
        partial,
        sums,
        arrivals,
        page_table.stride(0),
        scale * LOG2E,
        window=window or 0,
        kv_heads=kv_heads,
        group=group,
        page_len=page_len,
        head_dim=head_dim,
        padded=padded if one_row else max(padded, 16),
        block=block,
        stored=stored,
        splits=splits,
        stages=1 if facts(query.device) == INTERPRETER else 3,
        num_warps=2 if not one_row and stored != TOKENS.value else 4,
        **rows,
        **options(facts(query.device)),
    )
    return out


@triton.jit
def _part(length, split, window: tl.constexpr, splits: tl.constexpr, block: tl.constexpr):
    """oldest token that is seen, first (a multiple of block) and end of this part."""
    oldest = 0
    if window:
        oldest = tl.maximum(length - window, 0)
    base = oldest // block * block
    share = tl.cdiv(tl.cdiv(length - base, splits), block) * block
    start = base + split * share
    return oldest, start, tl.minimum(start + share, length)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_one(
    query,
    key,
    value,
    key_scale,
    key_zero,
    value_scale,
    value_zero,
    key_steps,
    value_steps,
    context_lens,
    page_table,
    out,
    partial,
    sums,
    arrivals,
    table_stride,
    factor,
    window: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    stored: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query head a KV head: every row of a tile keeps its own largest score and sums, joined once at the end, so
    that the loop has no barrier."""
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(context_lens + sequence)
    oldest, start, end = _part(length, split, window, splits, block)
    column = tl.arange(0, padded)
    here = column < head_dim
    table = page_table + sequence * table_stride
    channel = head * head_dim + column
    if stored == CHANNELS:
        k_scale = tl.load(key_scale + channel, mask=here, other=0.0)
    if PDL:
        depend()
    q = tl.load(query + (sequence * kv_heads + head) * head_dim + column, mask=here, other=0.0).to(tl.float32) * factor
    if stored == CHANNELS:
        q *= k_scale
    total = tl.sum(q, axis=0)
    best = tl.full([block], float("-inf"), tl.float32)
    weight = tl.zeros([block], tl.float32)
    moved = tl.zeros([block], tl.float32)
    acc = tl.zeros([block, padded], tl.float32)
    for first in tl.range(start, end, block, num_stages=stages):
        token = first + tl.arange(0, block)
        inside = token < end
        place = places(table, first, tl.minimum(token, end - 1), head, kv_heads, page_len, block)
        k = read_rows(key, place, inside, head_dim, padded, stored == PLAIN).to(tl.float32)
        v = read_rows(value, place, inside, head_dim, padded, stored == PLAIN).to(tl.float32)
        score = tl.sum(k * q[None, :], axis=1)
        if stored == TOKENS:
            scale = tl.load(key_steps + place * 2, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(key_steps + place * 2 + 1, mask=inside, other=0.0).to(tl.float32)
            score = (score - 128.0 * total) * scale + zero * total
        if window:
            inside = inside & (token >= oldest)
        score = tl.where(inside, score, float("-inf"))
        highest = tl.maximum(best, score)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(score - shift)
        keep = tl.exp2(best - shift)
        best = highest
        weight = weight * keep + p
        if stored == TOKENS:
            scale = tl.load(value_steps + place * 2, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(value_steps + place * 2 + 1, mask=inside, other=0.0).to(tl.float32)
            moved = moved * keep + p * (zero - 128.0 * scale)
            p = p * scale
        acc = acc * keep[:, None] + p[:, None] * v
    highest = tl.max(best, axis=0)
    keep = tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    weights = tl.sum(weight * keep, axis=0)
    sure = tl.where(weights > 0, weights, 1.0)
    o = tl.sum(acc * keep[:, None], axis=0) / sure
    if stored == CHANNELS:
        scale = tl.load(value_scale + channel, mask=here, other=0.0)
        o = (o - 128.0) * scale + tl.load(value_zero + channel, mask=here, other=0.0)
    if stored == TOKENS:
        o += tl.sum(moved * keep, axis=0) / sure
    o = tl.where(weights > 0, o, 0.0)
    row = sequence * kv_heads + head
    if splits == 1:
        tl.store(out + row * head_dim + column, o.to(out.dtype.element_ty), mask=here)
    else:
        logs = tl.where(weights > 0, highest + tl.log2(sure), float("-inf"))
        one = tl.arange(0, 1)
        mask = (one == 0)[:, None] & here[None, :]
        at = row.to(tl.int32)
        _join(partial, sums, out, arrivals, at, split, o[None, :], logs + one, at + one, mask, column, head_dim, splits)


@triton.jit(do_not_specialize=["table_stride"])
def _decode_group(
    query,
    key,
    value,
    key_scale,
    key_zero,
    value_scale,
    value_zero,
    key_steps,
    value_steps,
    context_lens,
    page_table,
    out,
    partial,
    sums,
    arrivals,
    table_stride,
    factor,
    window: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    stored: tl.constexpr,
    splits: tl.constexpr,
    stages: tl.constexpr,
    rows: tl.constexpr,
    PDL: tl.constexpr,
):
    """Several query heads a KV head, as the rows of a matrix product."""
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind: tl.constexpr = query.dtype.element_ty
    length = tl.load(context_lens + sequence)
    oldest, start, end = _part(length, split, window, splits, block)
    column = tl.arange(0, padded)
    here = column < head_dim
    row = tl.arange(0, rows)
    table = page_table + sequence * table_stride
    channel = head * head_dim + column
    if stored == CHANNELS:
        k_scale = tl.load(key_scale + channel, mask=here, other=0.0)
    if PDL:
        depend()
    head_row = (sequence * kv_heads + head) * group + row
    mask = (row < group)[:, None] & here[None, :]
    q = tl.load(query + head_row[:, None] * head_dim + column[None, :], mask=mask, other=0.0)
    reach = tl.full([rows], 1.0, tl.float32)
    if stored == CHANNELS:
        # Scales can be so small that the product leaves float16: each row is brought to a largest magnitude of 1.
        wide = q.to(tl.float32) * k_scale[None, :]
        reach = tl.max(tl.abs(wide), axis=1)
        reach = tl.where(reach > 0, reach, 1.0)
        q = (wide / reach[:, None]).to(kind)
    reach = reach * factor
    best = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, padded], tl.float32)
    for first in tl.range(start, end, block, num_stages=stages):
        token = first + tl.arange(0, block)
        inside = token < end
        place = places(table, first, tl.minimum(token, end - 1), head, kv_heads, page_len, block)
        k = read_rows(key, place, inside, head_dim, padded, stored == PLAIN)
        v = read_rows(value, place, inside, head_dim, padded, stored == PLAIN)
        if stored == TOKENS:
            k = dequantized(k, key_steps, place, inside)
            v = dequantized(v, value_steps, place, inside)
        score = tl.dot(q, tl.trans(k.to(kind)), input_precision="ieee") * reach[:, None]
        if window:
            inside = inside & (token >= oldest)
        score = tl.where(inside[None, :], score, float("-inf"))
        highest = tl.maximum(best, tl.max(score, axis=1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(score - shift[:, None]).to(kind)
        keep = tl.exp2(best - shift)
        best = highest
        # The sum is that of the rounded weights, so that the offset of bytes cancels exactly.
        weight = weight * keep + tl.sum(p.to(tl.float32), axis=1)
        acc = acc * keep[:, None] + tl.dot(p, v.to(kind), input_precision="ieee")
    sure = tl.where(weight > 0, weight, 1.0)
    o = acc / sure[:, None]
    if stored == CHANNELS:
        scale = tl.load(value_scale + channel, mask=here, other=0.0)
        o = (o - 128.0) * scale[None, :] + tl.load(value_zero + channel, mask=here, other=0.0)[None, :]
    o = tl.where((weight > 0)[:, None], o, 0.0)
    if splits == 1:
        tl.store(out + head_row[:, None] * head_dim + column[None, :], o.to(kind), mask=mask)
    else:
        logs = tl.where(weight > 0, best + tl.log2(sure), float("-inf"))
        at = (sequence * kv_heads + head).to(tl.int32)
        _join(partial, sums, out, arrivals, at, split, o, logs, head_row, mask, column, head_dim, splits)


@triton.jit
def _join(
    partial,
    sums,
    out,
    arrivals,
    tile,
    split,
    o,
    logs,
    head_row,
    mask,
    column,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
):
    """Stores a part o [rows, padded] with the logarithm of its weight [rows]; in the last program of a tile to arrive,
    also the whole result."""
    part = head_row.to(tl.int64) * splits + split
    here = tl.max(mask.to(tl.int32), axis=1) > 0
    tl.store(partial + part[:, None] * head_dim + column[None, :], o, mask=mask)
    tl.store(sums + part, logs, mask=here)
    tl.debug_barrier()  # every thread's values are written before one thread counts the program in
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == splits - 1
    if last:
        first = head_row.to(tl.int64) * splits
        highest = tl.full(logs.shape, float("-inf"), tl.float32)
        for other in range(splits):
            one = tl.load(sums + first + other, mask=here, other=float("-inf"), cache_modifier=".cg")
            highest = tl.maximum(highest, one)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        whole = tl.zeros(logs.shape, tl.float32)
        total = tl.zeros(o.shape, tl.float32)
        for other in range(splits):
            one = tl.load(sums + first + other, mask=here, other=float("-inf"), cache_modifier=".cg")
            weight = tl.exp2(one - shift)
            at = (first + other)[:, None] * head_dim + column[None, :]
            total += weight[:, None] * tl.load(partial + at, mask=mask, other=0.0, cache_modifier=".cg")
            whole += weight
        total = total / tl.where(whole > 0, whole, 1.0)[:, None]
        at = head_row.to(tl.int64)[:, None] * head_dim + column[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
        tl.store(arrivals + tile, 0)
