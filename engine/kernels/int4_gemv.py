# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
# ruff: noqa: RUF005  (Gluon has no unpacking)
"""y = x W^T with 4-bit weights and up to eight rows of x: the time is that of reading W.

A program has 16 or 32 rows of W; its warps share out the inputs, and their sums meet once at the end. The products are
matrix instructions of eight columns, so eight rows of x cost what one does, and the scales multiply sums of exact
products in float32. For NVIDIA cards from sm_80.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from engine.kernels import dependent_launch
from engine.kernels.device import Device, facts
from engine.kernels.int4_fragments import offsets, scales, silu, turns_apart, unpack
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.tuning import Config

MOST_ROWS = 8


def runs(m: int, dtype: torch.dtype, weights: Int4Weights, device: Device) -> bool:
    """Whether this kernel can do a product here."""
    return (
        1 <= m <= MOST_ROWS
        and device.capability >= (8, 0)
        and weights.group_size >= 32
        and weights.in_features % 2 == 0
        and dtype in (torch.float16, torch.bfloat16)
    )


def default_config(m: int, weights: Int4Weights, device: Device) -> dict[str, Any]:
    """rows: 16-row blocks of W a program; warps that share out the inputs; tiles of 128 inputs ahead of each warp."""
    return {"kernel": "gemv", "rows": 1, "warps": 8, "ahead": 4}


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries."""
    if m > MOST_ROWS:
        return []
    return [
        {"kernel": "gemv", "rows": rows, "warps": warps, "ahead": ahead}
        for rows, warps, ahead in (
            (1, 4, 4),
            (1, 8, 2),
            (1, 8, 4),
            (1, 16, 2),
            (2, 4, 2),
            (2, 4, 4),
            (2, 8, 2),
            (2, 8, 4),
        )
    ]


def run(x: Tensor, weights: Int4Weights, bias: Tensor | None, config: Config, *, gated: bool = False) -> Tensor:
    """The product for x [M, in], M up to 8; `gated` as in `int4_linear`."""
    m, n = x.shape[0], weights.out_features
    y = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    tiles, whole = weights.words.shape[1], weights.in_features % 128 == 0
    launch = dependent_launch.options(facts(x.device))
    if (config["rows"], config["ahead"], weights.group_size) == (2, 2, 128) and whole and x.dtype == torch.float16:
        launch["maxnreg"] = 128  # without a bound 130 to 138, for which a multiprocessor holds one program less
    _gemv[(-(-n // (16 * config["rows"])),)](
        x.contiguous(),
        weights.words,
        weights.scale_zero,
        y if bias is None else bias,
        y,
        m,
        n,
        weights.in_features,
        tiles,
        -(-tiles // (config["warps"] * config["ahead"])),
        GROUP=weights.group_size,
        HAS_BIAS=bias is not None,
        GATED=gated,
        WHOLE=whole,
        ROWS=config["rows"],
        WARPS=config["warps"],
        AHEAD=config["ahead"],
        num_warps=config["warps"],
        **launch,
    )
    return y


@gluon.constexpr_function
def bases(start, end, rank):
    """[start, 0...], [2 start, 0...] below end: bases of a layout along the first dimension of `rank`."""
    found = []
    while start < end:
        found.append([start] + [0] * (rank - 1))
        start *= 2
    return found


@gluon.constexpr_function
def word_layout(rows, warps):
    """Of [(warp, block, a, r, t), 4 int32]: 16 bytes a thread, a warp reading what lies together."""
    lanes = bases(1, 32, 2)
    registers = [[0, 1], [0, 2], *bases(32, 64 * rows, 2)]
    return gl.DistributedLinearLayout(
        registers, lanes, bases(64 * rows, 64 * rows * warps, 2), [], [64 * rows * warps, 4]
    )


@gluon.constexpr_function
def pair_layout(rows, warps):
    """Of [(warp, block, r), half]: a thread has its two rows of each block; lanes that differ in t have the same."""
    lanes = [[0, 0], [0, 0], *bases(1, 8, 2)]
    registers = [[0, 1], *bases(8, 8 * rows, 2)]
    return gl.DistributedLinearLayout(registers, lanes, bases(8 * rows, 8 * rows * warps, 2), [], [8 * rows * warps, 2])


@gluon.jit
def word_pointers(words_ptr, block, tile, tiles, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Pointers to the int32 [P, 4] of tiles tile .. tile + WARPS - 1, one a warp."""
    LAYOUT: gl.constexpr = word_layout(ROWS, WARPS)
    p = gl.arange(0, 64 * ROWS * WARPS, layout=gl.SliceLayout(1, LAYOUT))
    here = tile + p // (64 * ROWS)
    first = ((block // 4 * tiles + here) * 2 + p // 32 % 2) * 128 + (block % 4 + p // 64 % ROWS) * 32 + p % 32
    inner = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))
    return words_ptr + (first.to(gl.int64) * 4)[:, None] + inner[None, :]


@gluon.jit
def pair_pointers(
    scale_zero_ptr, block, tile, tiles, group, GROUPS: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr
):
    """Pointers to the scales and zeros int32 [Q, 2] of a group of each of the tiles."""
    LAYOUT: gl.constexpr = pair_layout(ROWS, WARPS)
    q = gl.arange(0, 8 * ROWS * WARPS, layout=gl.SliceLayout(1, LAYOUT))
    here = tile + q // (8 * ROWS)
    first = ((block // 4 * tiles + here) * GROUPS + group) * 64 + (block % 4 + q // 8 % ROWS) * 16 + q % 8 * 2
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, LAYOUT))
    return scale_zero_ptr + first[:, None] + half[None, :]


@gluon.jit
def _load_words(words_ptr, block, tile, tiles, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """What `word_pointers` points to; zeros past the last tile."""
    p = gl.arange(0, 64 * ROWS * WARPS, layout=gl.SliceLayout(1, word_layout(ROWS, WARPS)))
    pointers = word_pointers(words_ptr, block, tile, tiles, ROWS, WARPS)
    return gl.load(pointers, mask=(tile + p // (64 * ROWS) < tiles)[:, None], other=0)


@gluon.jit
def _load_pairs(
    scale_zero_ptr, block, tile, tiles, group, GROUPS: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr
):
    """What `pair_pointers` points to; scales of 0 past the last tile."""
    q = gl.arange(0, 8 * ROWS * WARPS, layout=gl.SliceLayout(1, pair_layout(ROWS, WARPS)))
    pointers = pair_pointers(scale_zero_ptr, block, tile, tiles, group, GROUPS, ROWS, WARPS)
    return gl.load(pointers, mask=(tile + q // (8 * ROWS) < tiles)[:, None], other=0)


@gluon.jit
def _load_inputs(x_ptr, tile, tiles, m, k, WHOLE: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr):
    """The inputs of x that a tile a warp is multiplied with: eight operands [WARPS, 16, 8]."""
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, B)))
    inner = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, B)))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, B)))
    inputs = ((tile + warp) * 128)[:, None, None] + inner[None, :, None]
    found = ()
    for step in gl.static_range(8):
        mask = (token < m)[None, None, :]
        if WHOLE:  # tiles of inputs are whole: what lies past the last one is a warp's whole share
            mask = mask & (tile + warp < tiles)[:, None, None]
        else:
            mask = mask & (inputs + 16 * step < k)
        found = found + (gl.load(x_ptr + inputs + 16 * step + (token * k)[None, None, :], mask=mask, other=0.0),)
    return found


@gluon.jit
def multiply(
    total,
    words,
    pairs,
    inputs,
    dtype: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    MMA: gl.constexpr,
):
    """total [WARPS, 16 ROWS, 8] and the product of each warp's tile of W with its inputs, eight operands of `dtype`."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WORD: gl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    # [warp, block, a, r, t, half, h] -> [warp, (block, half, r), (a, t), h]
    words = words.reshape([WARPS, ROWS, 2, 8, 4, 2, 2]).permute([0, 1, 5, 3, 2, 4, 6])
    halves = words.reshape([WARPS, 16 * ROWS, 8, 2]).split()
    part = gl.zeros([WARPS, 16 * ROWS, 8], gl.float32, MMA)
    for step in gl.static_range(8):
        if step % 4 == 0 or step * GROUPS % 8 == 0:
            # [warp, block, r, half] -> [warp, (block, half, r)]
            rows = pairs[step * GROUPS // 8].reshape([WARPS, ROWS, 8, 2]).permute([0, 1, 3, 2])
            rows = rows.reshape([WARPS, 16 * ROWS])
            offset = gl.convert_layout(offsets(rows, dtype), gl.SliceLayout(2, WORD), assert_trivial=True)
            half = gl.convert_layout(halves[step // 4], WORD, assert_trivial=True)
            w = unpack(half, gl.expand_dims(offset, 2), dtype)
        left = w[step % 4].reshape([WARPS, 16 * ROWS, 16])
        part = mma_v2(gl.convert_layout(left, A, assert_trivial=True), inputs[step], part)
        if (step + 1) * GROUPS % 8 == 0:
            scale = gl.convert_layout(scales(rows), gl.SliceLayout(2, MMA), assert_trivial=True)
            total += part * gl.expand_dims(scale, 2)
            part = gl.zeros([WARPS, 16 * ROWS, 8], gl.float32, MMA)
    return total


@gluon.jit
def store(
    total,
    block,
    bias_ptr,
    y_ptr,
    m,
    n,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    ROWS: gl.constexpr,
    MMA: gl.constexpr,
):
    """Stores the rows of W from block `block` on: the sum of all warps' totals, the bias, the activation if GATED."""
    y = gl.sum(total, 0)
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    row = block * 16 + gl.arange(0, 16 * ROWS, layout=gl.SliceLayout(1, OUT))
    token = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))
    if HAS_BIAS:
        y += gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32)[:, None]
    mask = (row < n)[:, None] & (token < m)[None, :]
    if GATED:
        gate, up = turns_apart(y, ROWS, 8)
        y = silu(gate) * up
        place = (row // 16 * 8 + row % 8)[:, None] + (token * (n // 2))[None, :]
        place, _ = turns_apart(gl.where(mask, place, -1), ROWS, 8)
        gl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=place >= 0)
    else:
        gl.store(y_ptr + row[:, None] + (token * n)[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["m", "n", "tiles", "turns"])
def _gemv(
    x_ptr,
    words_ptr,
    scale_zero_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    tiles,
    turns,
    GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    WHOLE: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    PDL: gl.constexpr,
):
    """ROWS blocks of 16 rows of W; `turns` times AHEAD tiles a warp, each loaded one turn before it is used."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    GROUPS: gl.constexpr = 128 // GROUP
    block = gl.program_id(0) * ROWS
    words, pairs = (), ()
    for step in gl.static_range(AHEAD):
        words = words + (_load_words(words_ptr, block, step * WARPS, tiles, ROWS, WARPS),)
        for group in gl.static_range(GROUPS):
            pairs = pairs + (_load_pairs(scale_zero_ptr, block, step * WARPS, tiles, group, GROUPS, ROWS, WARPS),)
    if PDL:
        dependent_launch.depend()
    total = gl.zeros([WARPS, 16 * ROWS, 8], gl.float32, MMA)
    for turn in range(turns):
        for step in gl.static_range(AHEAD):
            tile = (turn * AHEAD + step) * WARPS
            inputs = _load_inputs(x_ptr, tile, tiles, m, k, WHOLE, WARPS, MMA)
            total = multiply(total, words[0], pairs[:GROUPS], inputs, x_ptr.dtype.element_ty, GROUPS, ROWS, WARPS, MMA)
            # What was used is replaced by the same step of the next turn, and the tuples go round once a turn.
            tile += AHEAD * WARPS
            words = words[1:] + (_load_words(words_ptr, block, tile, tiles, ROWS, WARPS),)
            pairs = pairs[GROUPS:]
            for group in gl.static_range(GROUPS):
                pairs = pairs + (_load_pairs(scale_zero_ptr, block, tile, tiles, group, GROUPS, ROWS, WARPS),)
    store(total, block, bias_ptr, y_ptr, m, n, HAS_BIAS, GATED, ROWS, MMA)
