# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""`decode_walk` for several query heads a KV head, which are the rows of a matrix product as in `decode_group`."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.decode_prologue import turned, write_token
from engine.kernels.decode_shares import ask, join, keep_part, share_of, span
from engine.kernels.dependent_launch import depend
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, places, read_rows, steps_at


@triton.jit(do_not_specialize=["batch", "table_stride", "query_stride"])
def walk_group(
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
    batch,
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
    most: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    stored: tl.constexpr,
    turns: tl.constexpr,
    norms: tl.constexpr,
    scaled: tl.constexpr,
    stages: tl.constexpr,
    PDL: tl.constexpr,
):
    """`group` query heads a KV head, `rows` with what fills a tile. `most` is a power of two that holds `batch`."""
    program = tl.program_id(0)
    kind: tl.constexpr = query.dtype.element_ty
    share, begin, end, sequence, head, number = share_of(
        program, context_lens, batch, kv_heads, window, most, block, turns
    )
    length = tl.load(context_lens + sequence)
    oldest, base, stop, count = span(length, window, block, turns)
    begin_tile = sequence * kv_heads + head
    begin_start = begin - number
    begin_count = count
    end_tile = begin_tile
    end_start = begin_start
    end_count = count
    column = tl.arange(0, padded)
    row = tl.arange(0, rows)
    if PDL:
        if begin < end:
            table = page_table + sequence.to(tl.int64) * table_stride
            ask(key, value, table, base + number * block, stop, head, kv_heads, page_len, head_dim, block)
        depend()
    q = tl.zeros([rows, padded], kind)
    reach = tl.zeros([rows], tl.float32)
    best = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, padded], tl.float32)
    for step in tl.range(begin, end, num_stages=stages):
        first = base + number * block
        token = first + tl.arange(0, block)
        inside = token < stop
        table = page_table + sequence.to(tl.int64) * table_stride
        place = places(table, first, tl.maximum(tl.minimum(token, stop - 1), 0), head, kv_heads, page_len, block)
        k = read_rows(key, place, inside, head_dim, padded, stored == PLAIN)
        v = read_rows(value, place, inside, head_dim, padded, stored == PLAIN)
        if stored == TOKENS:
            k_step, k_middle = steps_at(key_steps, place, inside)
            v_step, v_middle = steps_at(value_steps, place, inside)
            k = (k - 128.0) * k_step[:, None] + k_middle[:, None]
            v = (v - 128.0) * v_step[:, None] + v_middle[:, None]
        if (number == 0) | (step == begin):
            q, reach, best, weight, acc = _begin(
                (query, query_scale, query_norm, cos, sin, slots, query_stride),
                (key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps, key_norm),
                sequence,
                head,
                # the newest token is for the program that has the last block
                (step - number + count <= end) & (length > 0),
                row,
                column,
                eps,
                factor,
                kv_heads,
                group,
                page_len,
                head_dim,
                stored,
                turns,
                norms,
                scaled,
            )
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
        if (number == count - 1) | (step == end - 1):
            _end(
                (out, partial, sums, value_scale, value_zero),
                (best, weight, acc),
                sequence * kv_heads + head,
                head,
                program,
                (step - number) // share,
                (step - number + count - 1) // share,
                row,
                column,
                group,
                head_dim,
                stored,
            )
        end_tile = sequence * kv_heads + head
        end_start = step - number
        end_count = count
        number += 1
        if number == count:
            number = 0
            head += 1
            if head == kv_heads:
                head = 0
                sequence = tl.minimum(sequence + 1, batch - 1)
                length = tl.load(context_lens + sequence)
                oldest, base, stop, count = span(length, window, block, turns)
    if begin < end:
        tl.debug_barrier()  # every thread's parts are written before one thread counts the program in
        at = row[:, None] * head_dim + column[None, :]
        mask = (row < group)[:, None] & (column < head_dim)[None, :]
        rest = at, row, mask, row < group, group * head_dim, group
        results = out, partial, sums, arrivals
        last = (begin_start + begin_count - 1) // share
        join(results, begin_tile, begin_start // share, last, *rest)
        if end_start > begin_start:
            join(results, end_tile, program, (end_start + end_count - 1) // share, *rest)


@triton.jit
def _begin(
    queries,
    pages,
    sequence,
    head,
    newest,
    row,
    column,
    eps,
    factor,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    stored: tl.constexpr,
    turns: tl.constexpr,
    norms: tl.constexpr,
    scaled: tl.constexpr,
):
    """q of the heads [rows, padded] and what their scores are multiplied by; largest score, weight and weighted values
    of each before the first block. With `turns`, and if this part has the `newest` token, that is in the pages then
    and in those sums."""
    query, query_scale, query_norm, cos, sin, slots, query_stride = queries
    key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps, key_norm = pages
    kind: tl.constexpr = query.dtype.element_ty
    here = column < head_dim
    mask = (row < group)[:, None] & here[None, :]
    best = tl.full(row.shape, float("-inf"), tl.float32)
    weight = tl.zeros(row.shape, tl.float32)
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    if turns:
        own = query + sequence.to(tl.int64) * query_stride
        start = own + (head * group + row)[:, None] * head_dim
        turning = cos, sin
        wide = turned(start, turning, query_norm, sequence, column[None, :], mask, eps, head_dim, norms, kind, True)
        if scaled:
            wide *= tl.load(query_scale + sequence)
        q = wide.to(kind)
    else:
        start = query + ((sequence * kv_heads + head).to(tl.int64) * group + row)[:, None] * head_dim
        q = tl.load(start + column[None, :], mask=mask, other=0.0)
    reach = tl.full(row.shape, 1.0, tl.float32)
    if stored == CHANNELS:
        # Scales can be so small that the product leaves float16: each row is brought to a largest magnitude of 1.
        wide = q.to(tl.float32) * tl.load(key_scale + head * head_dim + column, mask=here, other=0.0)[None, :]
        reach = tl.max(tl.abs(wide), axis=1)
        reach = tl.where(reach > 0, reach, 1.0)
        q = (wide / reach[:, None]).to(kind)
    reach = reach * factor
    if turns:  # noqa: SIM102 - the first is known when compiling
        if newest:
            k, k_step, k_middle, v, v_step, v_middle = write_token(
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
            if stored == TOKENS:
                k = ((k - 128.0) * k_step + k_middle).to(kind).to(tl.float32)
                v = ((v - 128.0) * v_step + v_middle).to(kind).to(tl.float32)
            best = tl.sum(q.to(tl.float32) * tl.where(here, k, 0.0)[None, :], axis=1) * reach
            weight = tl.full(row.shape, 1.0, tl.float32)
            acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32) + v[None, :]
    return q, reach, best, weight, acc


@triton.jit
def _end(
    results,
    state,
    tile,
    head,
    program,
    first,
    last,
    row,
    column,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    stored: tl.constexpr,
):
    """Stores what the heads have found: the result, or a part of it where the programs `first` to `last` share their
    blocks, with the logarithms of its weights."""
    out, partial, sums, value_scale, value_zero = results
    best, weight, acc = state
    here = column < head_dim
    sure = tl.where(weight > 0, weight, 1.0)
    o = acc / sure[:, None]
    if stored == CHANNELS:
        channel = head * head_dim + column
        scale = tl.load(value_scale + channel, mask=here, other=0.0)
        o = (o - 128.0) * scale[None, :] + tl.load(value_zero + channel, mask=here, other=0.0)[None, :]
    o = tl.where((weight > 0)[:, None], o, 0.0)
    at = row[:, None] * head_dim + column[None, :]
    mask = (row < group)[:, None] & here[None, :]
    if first == last:
        to = out + tile.to(tl.int64) * (group * head_dim)
        tl.store(to + at, o.to(out.dtype.element_ty), mask=mask)
    else:
        log = tl.where(weight > 0, best + tl.log2(sure), float("-inf"))
        keep_part(partial, sums, program, first, o, log, at, row, mask, row < group, group * head_dim, group)
