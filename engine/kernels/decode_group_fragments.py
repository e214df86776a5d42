# ruff: noqa: RET505  (a branch of constants: the other is not compiled only if it is an else)
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
"""Decode attention of up to eight query heads a KV head by matrix instructions, in Gluon, for NVIDIA cards from sm_80.

As `decode_fragments`, but the eight columns are the query heads of one KV head: K and V are read once for all of them.
A program is a KV head and a part of a sequence; its warps take the part's blocks by turns, each by itself, and join
what they have at the end, so that the loop has no barrier. To the compiler all warps hold the same (in no layout are
they a dimension); which of them it is, only assembly knows. So nothing in which they differ may be stored, or laid out
anew, but by `of_warps`.

Weights are relative to a number that reaches the greatest score of a column within LEEWAY. It is raised when a score
passes that, which few blocks do: most find out by one instruction (redux) that none has.
(Above 300 lines: one kernel; what else it needs is in `page_fragments` and `decode_joins` already.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels.decode_fragments import ABSENT, EXP2, FORM, LOG2, MOST_TOKENS_OF_BYTES, NONE, UNIT, ZERO
from engine.kernels.decode_joins import of_splits, of_warps
from engine.kernels.dependent_launch import depend, options, prefetch
from engine.kernels.device import Device, facts
from engine.kernels.group_operands import in_turns, lines_layout, out_layout, query_operand, sums_layout, weight_operand
from engine.kernels.load_order import in_order
from engine.kernels.page_fragments import (
    key_layout,
    key_operand,
    load_rows,
    load_steps,
    of_tokens,
    value_layout,
    value_operand,
)
from engine.kernels.page_rows import CHANNELS, PLAIN, TOKENS, pointers, storage_of
from engine.kernels.reference import Pages
from engine.kernels.splits import buffers
from engine.kernels.tuning import Config

MOST_HEADS = 8
# Rows of scores are tokens in their order, as rows of V are.
APART = gl.constexpr(8)
# By how much, in powers of two, weights may pass 1: sums of their float16 are exact to the same relative error.
LEEWAY = gl.constexpr(8.0)
LEEWAY_BITS = gl.constexpr(0x41000000)  # as float32
WARP = gl.constexpr("""{
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    shr.u32 thread, thread, 5;
    redux.sync.max.s32 $0, thread, 0xffffffff;
}""")


def runs(config: Config, query: Tensor, pages: Pages, most: int, device: Device) -> bool:
    """Whether this form is asked for and can do the attention of `query` [B, heads, head_dim] over all of a context of
    at most `most` tokens."""
    _, kv_heads, page_len, head_dim = pages.key.shape
    return (
        config.get("form") == FORM
        and device.capability >= (8, 0)
        and 1 < query.shape[1] // kv_heads <= MOST_HEADS
        and head_dim in (64, 128)
        and page_len % config["block"] == 0
        and query.dtype in (torch.float16, torch.bfloat16)
        and (
            pages.key.dtype == query.dtype
            or (pages.key.dtype == torch.uint8 and most <= MOST_TOKENS_OF_BYTES * config["warps"])
        )
    )


def candidates() -> list[Config]:
    """The configurations that tuning tries: tokens at once, warps, blocks that are asked for before the kernel before
    has ended, at most how many registers a thread gets, where that is not for the compiler to say, and parts that a
    context is cut into where a batch alone would not have it cut."""
    tried: list[Config] = [
        {"form": FORM, "block": block, "warps": warps, "asks": 1} for block in (16, 32) for warps in (1, 2, 4, 8)
    ]
    small = [config for config in tried if config["block"] == 16]
    tried += [{**config, "registers": 128} for config in small if config["warps"] > 2]
    return tried + [{**config, "parts": parts} for config in small if config["warps"] < 8 for parts in (2, 4)]


def run(
    query: Tensor,
    pages: Pages,
    context_lens: Tensor,
    page_table: Tensor,
    factor: float,
    out: Tensor,
    config: Config,
    splits: int = 1,
) -> None:
    """`decode_attention.decode_attention` into `out`; `factor` is its scale times log2(e)."""
    batch, heads, head_dim = out.shape
    kv_heads = pages.key.shape[1]
    key, value, *beside = pointers(pages, query)
    key_scale, _, value_scale, value_zero, key_steps, value_steps = beside
    partial, sums, arrivals = out, out, out
    if splits > 1:
        _, arrivals = buffers(query.device)
        partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device)
    launch: dict[str, Any] = options(facts(query.device))
    if "registers" in config:
        launch["maxnreg"] = config["registers"]
    _attend[(splits, kv_heads, batch)](
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
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PAGE_LEN=pages.key.shape[2],
        DIMS=head_dim,
        BLOCK=config["block"],
        ASKS=config["asks"],
        SPLITS=splits,
        WARPS=config["warps"],
        num_warps=config["warps"],
        **launch,
    )


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(EXP2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise(LOG2, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rows(steps, BLOCK: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr):
    """`of_tokens` beside scores."""
    scale, zero = of_tokens(steps, BLOCK, WARPS, APART)
    return gl.convert_layout(scale, MMA, assert_trivial=True), gl.convert_layout(zero, MMA, assert_trivial=True)


@gluon.jit
def _scores(
    k, steps, q, STORED: gl.constexpr, BLOCK: gl.constexpr, DIMS: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr
):
    """The scores of a block times log2(e): [BLOCK, 8]. `q` is `query_operand`'s."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    start, _ = gl.broadcast(q[2][None, :], gl.zeros([BLOCK, 8], gl.float32, MMA))
    score = mma_v2(key_operand(k, q[0].dtype, STORED, BLOCK, DIMS, A, APART), q[0], start)
    if STORED == TOKENS:
        scale, zero = _rows(steps, BLOCK, WARPS, MMA)
        return score * (scale * q[1]) + zero * (q[2] * (q[1] / -ZERO))[None, :]
    else:
        return score * q[1]


@gluon.jit
def _weigh(
    state,
    score,
    value_steps,
    left,
    STORED: gl.constexpr,
    TAIL: gl.constexpr,
    BLOCK: gl.constexpr,
    WARPS: gl.constexpr,
    MMA: gl.constexpr,
):
    """The block's weights [BLOCK, 8] as they multiply V, and the state, with its sums rescaled where a score of this
    block is far above what weights are relative to."""
    acc, sums, best, weight, moved = state
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    if TAIL:
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
        score = gl.where((row < left)[:, None], score, ABSENT)
    if STORED == TOKENS:
        scale, zero = _rows(value_steps, BLOCK, WARPS, MMA)
        reached = score + _log2(scale)
    else:
        reached = score
    above = (reached - best[None, :]).reshape([BLOCK // 8, 8, 4, 2]).permute([0, 3, 1, 2]).reshape([BLOCK // 4, 32])
    # As whole numbers floats above 0 are in their order, and others below.
    if gl.max(gl.max(above, 0).to(gl.int32, bitcast=True), 0) > LEEWAY_BITS:
        highest = gl.convert_layout(gl.maximum(best, gl.floor(gl.max(reached, 0))), COLUMNS, assert_trivial=True)
        keep = _exp2(best - highest)[None, :]
        acc, sums = acc * keep, sums * keep
        if STORED == TOKENS:
            keep = gl.convert_layout(keep, sums_layout(WARPS), assert_trivial=True)
            weight, moved = weight * keep, moved * keep
        best = highest
    p = _exp2(score - best[None, :])
    if STORED == TOKENS:
        weight = _gathered(weight, p, BLOCK, WARPS)
        moved = _gathered(moved, p * zero, BLOCK, WARPS)
        p = p * scale
    return (acc, sums, best, weight, moved), p


@gluon.jit
def _gathered(total, x, BLOCK: gl.constexpr, WARPS: gl.constexpr):
    """Sums [8, 8] and x [BLOCK, 8] on top, by each lane for itself."""
    x = gl.sum(x.reshape([BLOCK // 8, 8, 8]), 0)
    return total + gl.convert_layout(x, sums_layout(WARPS), assert_trivial=True)


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
    WARPS: gl.constexpr,
    dtype: gl.constexpr,
    MMA: gl.constexpr,
):
    """The state with p V and p's sum."""
    acc, sums, best, weight, moved = state
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    p = weight_operand(p, BLOCK, dtype, gl.DotOperandLayout(1, MMA, 2))
    if TAIL and STORED == PLAIN:
        # What is not there may be no number, which no weight of 0 takes away.
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, value_layout(BLOCK, DIMS // 2, WARPS)))
        v = gl.where((row < left)[:, None], v, 0)
    acc = mma_v2(value_operand(v, dtype, STORED, BLOCK, DIMS, A), p, acc)
    sums = mma_v2(gl.full([16, BLOCK], 1.0, dtype, A), p, sums)
    return acc, sums, best, weight, moved


@gluon.jit
def _place(table, block, head, KV_HEADS: gl.constexpr, PAGE_LEN: gl.constexpr, BLOCK: gl.constexpr):
    """The row in pages [.., KV_HEADS, PAGE_LEN, ..] of the first token of a block."""
    page = gl.load(table + block // (PAGE_LEN // BLOCK)).to(gl.int64)
    return (page * KV_HEADS + head) * PAGE_LEN + block % (PAGE_LEN // BLOCK) * BLOCK


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
    GROUP: gl.constexpr,
    PAGE_LEN: gl.constexpr,
    DIMS: gl.constexpr,
    BLOCK: gl.constexpr,
    ASKS: gl.constexpr,
    SPLITS: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """A part of one sequence and KV head; `factor` is the scale of the scores times log2(e)."""
    split, head, sequence = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])
    WIDTH: gl.constexpr = DIMS // 2 if STORED == PLAIN else DIMS // 4
    KEYS: gl.constexpr = key_layout(BLOCK, WIDTH, WARPS, APART)
    VALUES: gl.constexpr = value_layout(BLOCK, WIDTH, WARPS)
    dtype: gl.constexpr = query.dtype.element_ty if STORED == PLAIN else gl.float16
    warp = gl.inline_asm_elementwise(WARP, "=r,r", [split], dtype=gl.int32, is_pure=True, pack=1)
    length = gl.load(context_lens + sequence)
    blocks = gl.cdiv(length, BLOCK)
    share = gl.cdiv(blocks, SPLITS)
    first = split * share + warp
    end = gl.minimum(split * share + share, blocks)
    turns = gl.maximum(end - first + WARPS - 1, 0) // WARPS
    table = page_table + sequence * table_stride
    if PDL:
        line = gl.arange(0, BLOCK * WIDTH // 32, layout=lines_layout(BLOCK * WIDTH // 32, WARPS)) * 32
        for early in gl.static_range(ASKS):
            if early < turns:
                place = _place(table, first + early * WARPS, head, KV_HEADS, PAGE_LEN, BLOCK)
                prefetch(key + place * WIDTH + line)
                prefetch(value + place * WIDTH + line)
        depend()
    tile = sequence * KV_HEADS + head
    columns = gl.zeros([8], gl.float32, gl.SliceLayout(0, MMA))
    none = gl.zeros([8, 8], gl.float32, sums_layout(WARPS))
    state = (
        gl.zeros([DIMS, 8], gl.float32, MMA),
        gl.zeros([16, 8], gl.float32, MMA),
        columns + NONE,
        none,
        none,
    )
    if turns > 0:
        place = _place(table, first, head, KV_HEADS, PAGE_LEN, BLOCK)
        k = load_rows(key, place, KEYS, BLOCK, WIDTH)
        v = load_rows(value, place, VALUES, BLOCK, WIDTH)
        key_step = load_steps(key_steps, place, STORED, BLOCK, WARPS, APART)
        value_step = load_steps(value_steps, place, STORED, BLOCK, WARPS, APART)
        place = _place(table, first + gl.minimum(1, turns - 1) * WARPS, head, KV_HEADS, PAGE_LEN, BLOCK)
        in_order(WARPS)
        heads = query + tile * (GROUP * DIMS)
        q = query_operand(heads, key_scale + head * DIMS, factor, STORED, GROUP, BLOCK, DIMS, WARPS, dtype, MMA)
        # What a turn loads the next one uses: within a turn the compiler would wait for it at once.
        for turn in range(1, turns):
            score = _scores(k, key_step, q, STORED, BLOCK, DIMS, WARPS, MMA)
            k = load_rows(key, place, KEYS, BLOCK, WIDTH)
            key_step = load_steps(key_steps, place, STORED, BLOCK, WARPS, APART)
            in_order(WARPS)
            state, p = _weigh(state, score, value_step, BLOCK, STORED, False, BLOCK, WARPS, MMA)
            state = _add(state, p, v, BLOCK, STORED, False, BLOCK, DIMS, WARPS, dtype, MMA)
            v = load_rows(value, place, VALUES, BLOCK, WIDTH)
            value_step = load_steps(value_steps, place, STORED, BLOCK, WARPS, APART)
            place = _place(table, first + gl.minimum(turn + 1, turns - 1) * WARPS, head, KV_HEADS, PAGE_LEN, BLOCK)
            in_order(WARPS)
        left = length - (first + (turns - 1) * WARPS) * BLOCK
        score = _scores(k, key_step, q, STORED, BLOCK, DIMS, WARPS, MMA)
        state, p = _weigh(state, score, value_step, left, STORED, True, BLOCK, WARPS, MMA)
        state = _add(state, p, v, left, STORED, True, BLOCK, DIMS, WARPS, dtype, MMA)
    acc, all_sums, best, weight, moved = state
    PART: gl.constexpr = 8 if STORED == PLAIN else DIMS // 8
    OUT: gl.constexpr = out_layout(PART, DIMS, WARPS)
    total = gl.max(all_sums, 0)
    if STORED == TOKENS:
        COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
        moved = gl.convert_layout(gl.sum(moved, 0), COLUMNS, assert_trivial=True)
        acc = acc * (1.0 / UNIT) + (moved - ZERO * total)[None, :]
        total = gl.convert_layout(gl.sum(weight, 0), COLUMNS, assert_trivial=True)
    o, total, best = of_warps(in_turns(acc, PART, DIMS), total, best, warp, DIMS, WARPS, OUT)
    dim = gl.arange(0, DIMS, layout=gl.SliceLayout(1, OUT))
    number = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))
    sure = gl.where(total > 0, total, 1.0)
    o = o / sure[None, :]
    if STORED == CHANNELS:
        o = o * (1.0 / UNIT) - ZERO
        scale = gl.load(value_scale + head * DIMS + dim)[:, None]
        o = o * scale + gl.load(value_zero + head * DIMS + dim)[:, None]
    o = gl.where((total > 0)[None, :], o, 0.0)
    here = number < GROUP
    row = tile * GROUP + number
    if SPLITS > 1:
        logs = gl.where(total > 0, best + _log2(sure), float("-inf"))
        o, last = of_splits(o, logs, partial, sums, arrivals, tile, row, split, here, dim, DIMS, SPLITS)
        if last:
            gl.store(out + (row * DIMS)[None, :] + dim[:, None], o.to(out.dtype.element_ty), mask=here[None, :])
    else:
        gl.store(out + (row * DIMS)[None, :] + dim[:, None], o.to(out.dtype.element_ty), mask=here[None, :])
