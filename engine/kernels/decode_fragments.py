# ruff: noqa: RET505  (a branch of constants: the other is not compiled only if it is an else)
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
"""Decode attention of one query head a KV head by matrix instructions, in Gluon, for NVIDIA cards from sm_80.

A program is one warp: a KV head and a part of a sequence. The query is eight equal columns: a matrix instruction then
multiplies eight times too much, and still takes less than to convert each byte and multiply it alone. How rows become
its operands is in `page_fragments`, how parts join in `decode_joins`. What the zero of bytes, 128, adds to a sum of
products is taken off by the sum of the other factor, as rounded.
(Above 300 lines: one kernel; what else it needs is in `page_fragments` and `decode_joins` already.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.decode_joins import of_parts
from engine.kernels.dependent_launch import depend, options, prefetch
from engine.kernels.device import Device, facts
from engine.kernels.load_order import in_order
from engine.kernels.page_fragments import (
    key_layout,
    key_operand,
    load_rows,
    load_steps,
    natural,
    of_tokens,
    out_layout,
    query_layout,
    score_layout,
    value_layout,
    value_operand,
    weight_operand,
)
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, pointers, storage_of
from engine.kernels.reference import Pages
from engine.kernels.splits import buffers
from engine.kernels.tuning import Config

# The value of `form` in a configuration that means these kernels.
FORM = "fragments"

# Matrix instructions cut off what a float32 sum has no room for, always towards zero: a relative error of 2e-4 to 5e-4
# up to 8000 tokens over bytes, 9e-4 at 33,000 and 1.6e-3 at 131,072.
MOST_TOKENS_OF_BYTES = 32768
# What a byte's 1 is as float16, and how many of it the zero of bytes is.
UNIT, ZERO = gl.constexpr(2.0**-24), gl.constexpr(128.0)
# Scores of tokens that are not there, and the greatest before there is one: no real score is as low.
ABSENT, NONE = gl.constexpr(-1.0e9), gl.constexpr(-(2**30))
EXP2 = gl.constexpr("ex2.approx.ftz.f32 $0, $1;")
LOG2 = gl.constexpr("lg2.approx.ftz.f32 $0, $1;")


def runs(config: Config, query: Tensor, pages: Pages, most: int, device: Device) -> bool:
    """Whether this form is asked for and can do the attention of `query` [B, heads, head_dim] over all of a context of
    at most `most` tokens."""
    _, kv_heads, page_len, head_dim = pages.key.shape
    return (
        config.get("form") == FORM
        and device.capability >= (8, 0)
        and query.shape[1] == kv_heads
        and head_dim in (64, 128)
        and page_len % config["block"] == 0
        and query.dtype in (torch.float16, torch.bfloat16)
        and (pages.key.dtype == query.dtype or (pages.key.dtype == torch.uint8 and most <= MOST_TOKENS_OF_BYTES))
    )


def candidates() -> list[Config]:
    """The configurations that tuning tries: tokens at once, blocks that are asked for before the kernel before has
    ended, and parts that a context is cut into where a batch alone would not have it cut."""
    blocks: list[Config] = [{"form": FORM, "block": block, "warps": 1} for block in (16, 32)]
    return [{**block, "asks": asks} for block in blocks for asks in (0, 1, 2)] + [
        {**block, "asks": 1, "parts": parts} for block in blocks for parts in (2, 4, 8)
    ]


def run(
    query: Tensor,
    pages: Pages,
    context_lens: Tensor,
    page_table: Tensor,
    factor: float,
    out: Tensor,
    config: Config,
    parts: int = 1,
) -> None:
    """`decode_attention.decode_attention` into `out`; `factor` is its scale times log2(e)."""
    batch, heads, head_dim = out.shape
    key, value, *beside = pointers(pages, query)
    key_scale, _, value_scale, value_zero, key_steps, value_steps = beside
    partial, sums, arrivals = out, out, out
    if parts > 1:
        _, arrivals = buffers(query.device)
        partial = torch.empty(batch, heads, parts, head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, parts, dtype=torch.float32, device=query.device)
    # Programs start in this order, so those of a long context do before those of the shorter ones behind it.
    _attend[(parts, heads, batch)](
        query,
        key.view(torch.int32),
        value.view(torch.int32),
        key_scale,
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
        page_table.stride(0),
        factor,
        STORED=storage_of(pages),
        KV_HEADS=heads,
        PAGE_LEN=pages.key.shape[2],
        DIMS=head_dim,
        BLOCK=config["block"],
        ASKS=config["asks"],
        PARTS=parts,
        num_warps=1,
        **options(facts(query.device)),
    )


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise(LOG2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _scores(k, steps, q, STORED: gl.constexpr, BLOCK: gl.constexpr, DIMS: gl.constexpr, MMA: gl.constexpr):
    """The scores of a block times log2(e): [BLOCK, 4], each lane having those of its tokens. `q` is `_query`'s."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    score = _one_column(mma_v2(key_operand(k, q[0].dtype, STORED, BLOCK, DIMS, A), q[0], q[2]), BLOCK)
    if STORED == TOKENS:
        scale, zero = of_tokens(steps, BLOCK)
        return score * (scale * q[1]) + zero * (_one_column(q[2], BLOCK) * (q[1] / -ZERO))
    else:
        return score * q[1]


@gluon.jit
def _one_column(products, BLOCK: gl.constexpr):
    """[BLOCK, 8] equal columns as the [BLOCK, 4] of which every lane has a copy."""
    column, _ = products.reshape([BLOCK, 4, 2]).split()
    return gl.convert_layout(column, score_layout(BLOCK), assert_trivial=True)


@gluon.jit
def _weigh(
    state,
    score,
    value_steps,
    left,
    STORED: gl.constexpr,
    TAIL: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """The block's weights [BLOCK, 4] as they multiply V, and the state with the sums rescaled to the block's greatest
    score. That is kept as a whole number, which one instruction finds among lanes; weights are at most 2."""
    acc, sums, best, weight, moved = state
    if STORED == TOKENS:
        scale, zero = of_tokens(value_steps, BLOCK)
        reached = score + _log2(scale)
    else:
        reached = score
    if TAIL:
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, score_layout(BLOCK)))
        inside = (row // 16 * 16 + row % 8 * 2 + row // 8 % 2 < left)[:, None]
        reached = gl.where(inside, reached, ABSENT)
        score = gl.where(inside, score, ABSENT)
    highest = gl.max(gl.max(reached.reshape([BLOCK // 8, 32]), 0).to(gl.int32), 0)
    if highest > best:
        keep = gl.exp2(best.to(gl.float32) - highest.to(gl.float32))
        acc, sums = acc * keep, sums * keep
        if STORED == TOKENS:
            weight, moved = weight * keep, moved * keep
        best = highest
    p = _exp2(score - best.to(gl.float32))
    if STORED == TOKENS:
        weight += p
        moved += p * zero
        p = p * scale
    return (acc, sums, best, weight, moved), p


@gluon.jit
def _add(
    state,
    p,
    v,
    left,
    STORED: gl.constexpr,
    TAIL: gl.constexpr,
    BLOCK: gl.constexpr,
    DIMS: gl.constexpr,
    dtype: gl.constexpr,
    MMA: gl.constexpr,
):
    """The state with p V and p's sum."""
    acc, sums, best, weight, moved = state
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    p = weight_operand(p, BLOCK, dtype, B)
    if TAIL and STORED == PLAIN:
        WIDTH: gl.constexpr = DIMS // 2
        # What is not there may be no number, which no weight of 0 takes away.
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, value_layout(BLOCK, WIDTH)))
        v = gl.where((row < left)[:, None], v, 0)
    acc = mma_v2(value_operand(v, dtype, STORED, BLOCK, DIMS, A), p, acc)
    sums = mma_v2(gl.full([16, BLOCK], 1.0, dtype, A), p, sums)
    return acc, sums, best, weight, moved


@gluon.jit
def _place(table, block, head, KV_HEADS: gl.constexpr, PAGE_LEN: gl.constexpr, BLOCK: gl.constexpr):
    """The row in pages [.., KV_HEADS, PAGE_LEN, ..] of the first token of a block."""
    page = gl.load(table + block // (PAGE_LEN // BLOCK)).to(gl.int64)
    return (page * KV_HEADS + head) * PAGE_LEN + block % (PAGE_LEN // BLOCK) * BLOCK


@gluon.jit
def _ask(pages, place, BLOCK: gl.constexpr, WIDTH: gl.constexpr):
    """Asks for a block of rows in the L2 cache; nothing waits for them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    LINES: gl.constexpr = BLOCK * WIDTH // 32
    prefetch(pages + place * WIDTH + gl.arange(0, LINES, layout=LAYOUT) * 32)


@gluon.jit
def _query(
    query,
    key_scale,
    factor,
    STORED: gl.constexpr,
    BLOCK: gl.constexpr,
    DIMS: gl.constexpr,
    dtype: gl.constexpr,
    MMA: gl.constexpr,
):
    """The right operand of the scores [DIMS, 8], what its products are to be multiplied by (`factor` and what it was
    divided by), and what they begin with: what the zero of bytes adds to them, taken off [BLOCK, 8].

    Beside bytes it is float16, brought to a magnitude of 1 to 2 by a power of two: scales of channels can be so small
    that the product with them leaves float16.
    """
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    PART: gl.constexpr = 8 if STORED == PLAIN else 16
    dim = gl.arange(0, DIMS, layout=query_layout(PART, DIMS))
    q = gl.load(query + dim)
    start = gl.zeros([BLOCK, 8], gl.float32, MMA)
    if STORED == CHANNELS or q.dtype != dtype:
        wide = q.to(gl.float32)
        if STORED == CHANNELS:
            wide *= gl.load(key_scale + dim)
        # 2^e of the largest, and 2^-e: where all are zeros 2^127 of them.
        power = gl.max(gl.abs(wide), 0).to(gl.int32, bitcast=True) & 0x7F800000
        q = (wide * (0x7F000000 - power).to(gl.float32, bitcast=True)).to(dtype)
        factor *= power.to(gl.float32, bitcast=True)
    q = q.reshape([DIMS // (4 * PART), 4, PART // 4, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([DIMS])
    q = gl.convert_layout(q, gl.SliceLayout(1, B), assert_trivial=True)
    q, _ = gl.broadcast(gl.expand_dims(q, 1), gl.zeros([DIMS, 8], dtype, B))
    if STORED != PLAIN:
        start = mma_v2(gl.full([BLOCK, DIMS], -ZERO * UNIT, dtype, A), q, start)
        factor *= 1.0 / UNIT
    return q, factor, start


@gluon.jit(do_not_specialize=["table_stride"])
def _attend(
    query,
    key,
    value,
    key_scale,
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
    STORED: gl.constexpr,
    KV_HEADS: gl.constexpr,
    PAGE_LEN: gl.constexpr,
    DIMS: gl.constexpr,
    BLOCK: gl.constexpr,
    ASKS: gl.constexpr,
    PARTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """A part of one sequence and KV head; `factor` is the scale of the scores times log2(e)."""
    part, head, sequence = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    WIDTH: gl.constexpr = DIMS // 2 if STORED == PLAIN else DIMS // 4
    KEYS: gl.constexpr = key_layout(BLOCK, WIDTH)
    VALUES: gl.constexpr = value_layout(BLOCK, WIDTH)
    dtype: gl.constexpr = query.dtype.element_ty if STORED == PLAIN else gl.float16
    length = gl.load(context_lens + sequence)
    all_blocks = gl.cdiv(length, BLOCK)
    if PARTS == 1:
        first, end = 0, all_blocks
    else:
        share = gl.cdiv(all_blocks, PARTS)
        first = part * share
        end = gl.minimum(first + share, all_blocks)
    table = page_table + sequence * table_stride
    if PDL:
        for early in gl.static_range(ASKS):
            if first + early < end:
                place = _place(table, first + early, head, KV_HEADS, PAGE_LEN, BLOCK)
                _ask(key, place, BLOCK, WIDTH)
                _ask(value, place, BLOCK, WIDTH)
        depend()
    row = sequence * KV_HEADS + head
    if first < end:
        place = _place(table, first, head, KV_HEADS, PAGE_LEN, BLOCK)
        k = load_rows(key, place, KEYS, BLOCK, WIDTH)
        v = load_rows(value, place, VALUES, BLOCK, WIDTH)
        key_step = load_steps(key_steps, place, STORED, BLOCK)
        value_step = load_steps(value_steps, place, STORED, BLOCK)
        place = _place(table, gl.minimum(first + 1, end - 1), head, KV_HEADS, PAGE_LEN, BLOCK)
        in_order(1)
        q = _query(query + row * DIMS, key_scale + head * DIMS, factor, STORED, BLOCK, DIMS, dtype, MMA)
        nothing = gl.zeros([BLOCK, 4], gl.float32, score_layout(BLOCK))
        state = (
            gl.zeros([DIMS, 8], gl.float32, MMA),
            gl.zeros([16, 8], gl.float32, MMA),
            gl.to_tensor(NONE),
            nothing,
            nothing,
        )
        # What a turn loads the next one uses: within a turn the compiler would wait for it at once.
        for block in range(first + 1, end):
            score = _scores(k, key_step, q, STORED, BLOCK, DIMS, MMA)
            k = load_rows(key, place, KEYS, BLOCK, WIDTH)
            key_step = load_steps(key_steps, place, STORED, BLOCK)
            in_order(1)
            state, p = _weigh(state, score, value_step, BLOCK, STORED, False, BLOCK)
            state = _add(state, p, v, BLOCK, STORED, False, BLOCK, DIMS, dtype, MMA)
            v = load_rows(value, place, VALUES, BLOCK, WIDTH)
            value_step = load_steps(value_steps, place, STORED, BLOCK)
            place = _place(table, gl.minimum(block + 1, end - 1), head, KV_HEADS, PAGE_LEN, BLOCK)
            in_order(1)
        left = length - (end - 1) * BLOCK
        score = _scores(k, key_step, q, STORED, BLOCK, DIMS, MMA)
        state, p = _weigh(state, score, value_step, left, STORED, True, BLOCK)
        acc, all_sums, best, weight, moved = _add(state, p, v, left, STORED, True, BLOCK, DIMS, dtype, MMA)
        PART: gl.constexpr = 8 if STORED == PLAIN else DIMS // 8
        OUT: gl.constexpr = out_layout(PART, DIMS)
        o = natural(acc, PART, DIMS, OUT)
        dim = gl.arange(0, DIMS, layout=gl.SliceLayout(1, OUT))
        total = gl.max(gl.max(all_sums, 1), 0)
        if STORED == TOKENS:
            # Each of the four lanes of a token has its weight.
            of_values = total
            total = gl.sum(gl.max(weight, 1), 0)
            o = (o * (1.0 / UNIT) - ZERO * of_values + gl.sum(gl.max(moved, 1), 0)) * (1.0 / total)
        else:
            o = o * (1.0 / total)
        if STORED == CHANNELS:
            o = o * (1.0 / UNIT) - ZERO
            scale = gl.load(value_scale + head * DIMS + dim)[:, None]
            o = o * scale + gl.load(value_zero + head * DIMS + dim)[:, None]
        copy = gl.arange(0, 4, layout=gl.SliceLayout(0, OUT))
        places = dim[:, None] + copy[None, :] * 0
        if PARTS == 1:
            gl.store(out + row * DIMS + places, o.to(out.dtype.element_ty), mask=copy[None, :] == 0)
        else:
            count = gl.cdiv(all_blocks, share)
            if count == 1:
                gl.store(out + row * DIMS + places, o.to(out.dtype.element_ty), mask=copy[None, :] == 0)
            else:
                log = best.to(gl.float32) + gl.log2(total)
                at = row * PARTS + part
                gl.store(partial + at * DIMS + places, o, mask=copy[None, :] == 0)
                gl.store(sums + at, log)
                of_parts(out + row * DIMS, partial, sums, arrivals, row, count, DIMS, PARTS)
    elif part == 0:
        lane = gl.arange(0, DIMS, layout=gl.BlockedLayout([DIMS // 32], [32], [1], [0]))
        gl.store(out + row * DIMS + lane, gl.zeros_like(lane).to(out.dtype.element_ty))
