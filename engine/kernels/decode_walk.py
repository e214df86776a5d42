# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The other form of decode attention: a fixed number of programs that walk through the blocks of all contexts.

The blocks of all sequences and KV heads, one after the other (a sequence's heads, a head's blocks from its oldest
token), are shared out evenly among the programs, wherever the cuts fall: no program waits for the one that has the
longest context, and the loop over blocks goes on from head to head, so that K and V of the next one are on their way
while this one ends. A head that was cut is joined by the last program to end, from first to last: see `decode_shares`.

One query head a KV head: as in `decode_one`, rows keep largest score and sums by themselves, here `rows` of them for
`block` tokens. Bytes become numbers as the digits of 1024 in float16, two at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.decode_prologue import turned, write_token
from engine.kernels.decode_shares import ask, join, keep_part, share_of, span
from engine.kernels.dependent_launch import depend
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, places, read_numbers, steps_at

# The number that a byte of 128 is read as.
MIDDLE = tl.constexpr(1024.0 + 128.0)


@triton.jit(do_not_specialize=["batch", "table_stride", "query_stride"])
def walk_one(
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
    """One query head a KV head. `most` is a power of two that holds `batch`."""
    program = tl.program_id(0)
    fold: tl.constexpr = block // rows
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
    if PDL:
        if begin < end:
            table = page_table + sequence.to(tl.int64) * table_stride
            ask(key, value, table, base + number * block, stop, head, kv_heads, page_len, head_dim, block)
        depend()
    q = tl.zeros([padded], tl.float32)
    tally = 0.0
    best = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    moved = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, padded], tl.float32)
    for step in tl.range(begin, end, num_stages=stages):
        first = base + number * block
        token = first + tl.arange(0, block)
        inside = token < stop
        table = page_table + sequence.to(tl.int64) * table_stride
        place = places(table, first, tl.maximum(tl.minimum(token, stop - 1), 0), head, kv_heads, page_len, block)
        k = read_numbers(key, place, inside, head_dim, padded, stored == PLAIN, PDL)
        v = read_numbers(value, place, inside, head_dim, padded, stored == PLAIN, PDL)
        if stored == TOKENS:
            key_step, key_middle = steps_at(key_steps, place, inside)
            value_step, value_middle = steps_at(value_steps, place, inside)
        if (number == 0) | (step == begin):
            q, tally, best, weight, moved, acc = _begin(
                (query, query_scale, query_norm, cos, sin, slots, query_stride),
                (key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps, key_norm),
                sequence,
                head,
                # the newest token is for the program that has the last block
                (step - number + count <= end) & (length > 0),
                column,
                eps,
                factor,
                kv_heads,
                page_len,
                head_dim,
                rows,
                stored,
                turns,
                norms,
                scaled,
            )
        score = tl.sum(k * q[None, :], axis=1)
        if stored == TOKENS:
            score = (score - MIDDLE * tally) * key_step + key_middle * tally
        if window:
            inside = inside & (token >= oldest)
        score = tl.where(inside, score, float("-inf")).reshape(fold, rows)
        highest = tl.maximum(best, tl.max(score, axis=0))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(score - shift[None, :])
        keep = tl.exp2(best - shift)
        best = highest
        weight = weight * keep + tl.sum(p, axis=0)
        if stored == TOKENS:
            value_step = value_step.reshape(fold, rows)
            moved = moved * keep + tl.sum(p * (value_middle.reshape(fold, rows) - MIDDLE * value_step), axis=0)
            p = p * value_step
        acc = acc * keep[:, None] + tl.sum(p[:, :, None] * v.reshape(fold, rows, padded), axis=0)
        if (number == count - 1) | (step == end - 1):
            _end(
                (out, partial, sums, value_scale, value_zero),
                (best, weight, moved, acc),
                sequence * kv_heads + head,
                head,
                program,
                (step - number) // share,
                (step - number + count - 1) // share,
                column,
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
    # A head that was cut is complete when all its programs are here: the one that this program began with, and the one
    # that it ended with.
    if begin < end:
        tl.debug_barrier()  # every thread's parts are written before one thread counts the program in
        one = tl.arange(0, 1)
        rest = one[:, None] + column[None, :], one, (column < head_dim)[None, :], one == 0, head_dim, 1
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
    column,
    eps,
    factor,
    kv_heads: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    rows: tl.constexpr,
    stored: tl.constexpr,
    turns: tl.constexpr,
    norms: tl.constexpr,
    scaled: tl.constexpr,
):
    """q of a head [padded] and the sum of its values; largest score, weight, what zero points add and weighted values
    of each row before the first block. With `turns`, and if this part has the `newest` token, that is in the pages
    then and in the first row."""
    query, query_scale, query_norm, cos, sin, slots, query_stride = queries
    key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps, key_norm = pages
    kind: tl.constexpr = query.dtype.element_ty
    here = column < head_dim
    best = tl.full([rows], float("-inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    moved = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, column.shape[0]], tl.float32)
    if turns:
        own = query + sequence.to(tl.int64) * query_stride
        start = own + head * head_dim
        q = turned(start, (cos, sin), query_norm, sequence, column, here, eps, head_dim, norms, kind, False)
        if scaled:
            q *= tl.load(query_scale + sequence)
        q = q.to(kind).to(tl.float32) * factor
    else:
        start = query + (sequence * kv_heads + head).to(tl.int64) * head_dim
        q = tl.load(start + column, mask=here, other=0.0).to(tl.float32) * factor
    if stored == CHANNELS:
        q *= tl.load(key_scale + head * head_dim + column, mask=here, other=0.0)
    tally = tl.sum(q, axis=0)
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
                kv_heads,
                column,
                eps,
                kv_heads,
                page_len,
                head_dim,
                norms,
                stored,
            )
            if stored != PLAIN:
                k += 1024.0
                v += 1024.0
            score = tl.sum(k * q, axis=0)
            first = tl.arange(0, rows) == 0
            if stored == TOKENS:
                score = (score - MIDDLE * tally) * k_step + k_middle * tally
                v *= v_step
                moved = tl.where(first, v_middle - MIDDLE * v_step, 0.0)
            best = tl.where(first, score, float("-inf"))
            weight = tl.where(first, 1.0, 0.0)
            acc = tl.where(first[:, None] & here[None, :], v[None, :], 0.0)
    return q, tally, best, weight, moved, acc


@triton.jit
def _end(
    results,
    state,
    tile,
    head,
    program,
    first,
    last,
    column,
    head_dim: tl.constexpr,
    stored: tl.constexpr,
):
    """Stores what a head's rows have found: the result, or a part of it where the programs `first` to `last` share its
    blocks, with the logarithm of its weight."""
    out, partial, sums, value_scale, value_zero = results
    best, weight, moved, acc = state
    here = column < head_dim
    highest = tl.max(best, axis=0)
    keep = tl.exp2(best - tl.where(highest == float("-inf"), 0.0, highest))
    weights = tl.sum(weight * keep, axis=0)
    sure = tl.where(weights > 0, weights, 1.0)
    o = tl.sum(acc * keep[:, None], axis=0) / sure
    if stored == CHANNELS:
        channel = head * head_dim + column
        scale = tl.load(value_scale + channel, mask=here, other=0.0)
        o = (o - MIDDLE) * scale + tl.load(value_zero + channel, mask=here, other=0.0)
    if stored == TOKENS:
        o += tl.sum(moved * keep, axis=0) / sure
    o = tl.where(weights > 0, o, 0.0)
    if first == last:
        tl.store(out + tile.to(tl.int64) * head_dim + column, o.to(out.dtype.element_ty), mask=here)
    else:
        log = tl.where(weights > 0, highest + tl.log2(sure), float("-inf"))
        keep_part(partial, sums, program, first, o, log, column, 0, here, True, head_dim, 1)
