# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The kernels of `decode_attention`: one query head a KV head, and several.

A program takes one part ("split") of one sequence's context for one KV head and all query heads that read it; the last
program of a head to end joins the parts, from first to last, so that the result does not depend on who that is. Scales
of channels stay outside the loop over tokens: those of K go into the query, those of V into the result, and a zero
point of K moves all scores alike, which changes no softmax. With `turns` the query comes from a row of qkv, and K and V
of the token with it: see `decode_prologue`.
(Above 300 lines: two forms of one computation, whose long lists of pointers are the language's.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.decode_prologue import turned, write_token
from engine.kernels.dependent_launch import depend
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, ask_for_rows, dequantized, places, read_rows


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


@triton.jit
def _ask(
    key,
    value,
    table,
    start,
    end,
    head,
    kv_heads: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
):
    """Asks for the first two blocks of a part: what earlier steps wrote need not wait for the kernel before."""
    for number in tl.static_range(2):
        first = start + number * block
        if first < end:
            token = tl.minimum(first + tl.arange(0, block), end - 1)
            place = places(table, first, token, head, kv_heads, page_len, block)
            ask_for_rows(key, place, head_dim)
            ask_for_rows(value, place, head_dim)


@triton.jit(do_not_specialize=["table_stride", "query_stride"])
def decode_one(
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
    cos,
    sin,
    query_scale,
    query_norm,
    key_norm,
    slots,
    table_stride,
    query_stride,
    eps,
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
    turns: tl.constexpr,
    norms: tl.constexpr,
    scaled: tl.constexpr,
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
        _ask(key, value, table, start, end, head, kv_heads, page_len, head_dim, block)
        depend()
    if turns:
        own = query + sequence * query_stride
        if (start < length) & (length <= end):
            write_token(
                own,
                (cos, sin),
                key_norm,
                (key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps),
                tl.load(slots + sequence),
                sequence,
                head,
                kv_heads * group,
                column,
                eps,
                kv_heads,
                page_len,
                head_dim,
                norms,
                stored,
            )
        heads = own + head * head_dim
        kind: tl.constexpr = query.dtype.element_ty
        q = turned(heads, (cos, sin), query_norm, sequence, column, here, eps, head_dim, norms, kind, False)
        if scaled:
            q *= tl.load(query_scale + sequence)
        q = q.to(kind).to(tl.float32) * factor
    else:
        q = tl.load(query + (sequence * kv_heads + head) * head_dim + column, mask=here, other=0.0).to(tl.float32)
        q *= factor
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


@triton.jit(do_not_specialize=["table_stride", "query_stride"])
def decode_group(
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
    cos,
    sin,
    query_scale,
    query_norm,
    key_norm,
    slots,
    table_stride,
    query_stride,
    eps,
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
    turns: tl.constexpr,
    norms: tl.constexpr,
    scaled: tl.constexpr,
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
        _ask(key, value, table, start, end, head, kv_heads, page_len, head_dim, block)
        depend()
    head_row = (sequence * kv_heads + head) * group + row
    mask = (row < group)[:, None] & here[None, :]
    if turns:
        own = query + sequence * query_stride
        if (start < length) & (length <= end):
            write_token(
                own,
                (cos, sin),
                key_norm,
                (key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps),
                tl.load(slots + sequence),
                sequence,
                head,
                kv_heads * group,
                column,
                eps,
                kv_heads,
                page_len,
                head_dim,
                norms,
                stored,
            )
        heads = own + (head * group + row)[:, None] * head_dim
        wide = turned(heads, (cos, sin), query_norm, sequence, column[None, :], mask, eps, head_dim, norms, kind, True)
        if scaled:
            wide *= tl.load(query_scale + sequence)
        q = wide.to(kind)
    else:
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
