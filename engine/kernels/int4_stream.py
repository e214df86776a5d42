# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
# ruff: noqa: RUF005  (Gluon has no unpacking)
"""y = x W^T with 4-bit weights and up to eight rows of x, which can be the RMS norm of the residual stream.

The products are those of `int4_gemv`. Here every program has all rows of x in shared memory, and computes the residual
sum and the norm for itself where x is one, while its first weights are on their way. So there are few programs, each of
which goes on to further rows of W without a pause in its loads.
(Above 300 lines: one kernel, and how its operands are found.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels import dependent_launch, int4_gemv
from engine.kernels.device import Device, facts
from engine.kernels.int4_gemv import (
    bases,
    multiply,
    pair_layout,
    pair_pointers,
    store,
    word_layout,
    word_pointers,
)
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.load_order import barrier, in_order
from engine.kernels.tuning import Config

# What the rows of x may take of a multiprocessor's shared memory.
MOST_BYTES = 128 * 1024
# Words from one tile of inputs to the next.
TILE = gl.constexpr(1024)


def runs(m: int, dtype: torch.dtype, weights: Int4Weights, device: Device) -> bool:
    """Whether this kernel can do a product here, x being a norm or not."""
    fits = _padded_rows(m) * _padded_inputs(weights.in_features, 16) * 2 <= MOST_BYTES
    return int4_gemv.runs(m, dtype, weights, device) and fits


def default_config(m: int, weights: Int4Weights, device: Device) -> dict[str, Any]:
    """That of `int4_gemv`, and how many programs share out the rows of W (0: one for every `rows` blocks)."""
    return {"kernel": "stream", "rows": 1, "warps": 8, "ahead": 4, "programs": 2 * device.multiprocessors}


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries."""
    if m > int4_gemv.MOST_ROWS:
        return []
    shared = _padded_rows(m) * _padded_inputs(k, 4) * 2
    return [
        {"kernel": "stream", "rows": rows, "warps": warps, "ahead": ahead, "programs": share * device.multiprocessors}
        for rows, warps, ahead, shares in (
            (1, 4, 4, (2, 3, 4)),
            (1, 8, 2, (2, 3)),
            (1, 8, 4, (0, 1, 2)),
            (1, 16, 2, (1, 2)),
            (2, 4, 2, (0, 3, 4)),
            (2, 4, 4, (2,)),
            (2, 8, 2, (1, 2)),
        )
        for share in shares
        if share * shared <= 200_000
    ]


def run(x: Tensor, weights: Int4Weights, bias: Tensor | None, config: Config, *, gated: bool = False) -> Tensor:
    """The product for x [M, in], M up to 8; `gated` as in `int4_linear`."""
    return _launch(x.contiguous(), None, None, 0.0, None, weights, bias, config, gated)


def run_normed(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weights: Int4Weights,
    bias: Tensor | None,
    config: Config,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """The product of the norm of total = residual + delta [M, in], M up to 8, and total. `gated`: see `int4_linear`."""
    total = torch.empty_like(residual)
    stream = delta.contiguous(), residual.contiguous(), norm, eps, total
    return _launch(*stream, weights, bias, config, gated), total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    total: Tensor | None,
    weights: Int4Weights,
    bias: Tensor | None,
    config: Config,
    gated: bool,
) -> Tensor:
    m, n, k = len(x), weights.out_features, weights.in_features
    rows, warps, tiles = config["rows"], config["warps"], weights.words.shape[1]
    y = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    turns = -(-n // (16 * rows))
    programs = min(config["programs"] or turns, turns)
    _stream[(programs,)](
        x,
        x if residual is None else residual,
        x if norm is None else norm,
        eps,
        y if total is None else total,
        weights.words,
        weights.scale_zero,
        y if bias is None else bias,
        y,
        m,
        n,
        tiles,
        turns,
        NORMS=norm is not None,
        GROUP=weights.group_size,
        HAS_BIAS=bias is not None,
        GATED=gated,
        WIDTH=k,
        PADDED=_padded_inputs(k, warps),
        TOKENS=_padded_rows(m),
        ROWS=rows,
        WARPS=warps,
        AHEAD=min(config["ahead"], -(-tiles // warps)),
        STEPS=-(-tiles // warps),
        num_warps=warps,
        **dependent_launch.options(facts(x.device)),
    )
    return y


def _padded_rows(m: int) -> int:
    return 1 << (m - 1).bit_length()


def _padded_inputs(k: int, warps: int) -> int:
    """Whole tiles for all warps, a power of two."""
    return max(1 << (k - 1).bit_length(), 128 * warps)


@gluon.constexpr_function
def _operand_layout(tokens, warps):
    """Of [token, 8 / tokens, warp, 1, 4, 8 inputs]: two operands of a matrix instruction. Lanes without a token of
    their own have another's."""
    lanes = [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 4], *bases(1, tokens, 6)]
    lanes += [[0, *base] for base in bases(1, 8 // tokens, 5)]
    registers = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[0, 0, *base] for base in bases(1, warps, 4)], [], [tokens, 8 // tokens, warps, 1, 4, 8]
    )


@gluon.jit
def _load_words(places, step, end, WHOLE: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """The words of each warp's tile `step`, `places` being those of tile 0: addresses that differ by a constant. In
    place of tile `end` and what follows are any bits; with WHOLE there is none of them."""
    p = gl.arange(0, 64 * ROWS * WARPS, layout=gl.SliceLayout(1, word_layout(ROWS, WARPS)))
    if WHOLE:
        found = gl.load(places + step * WARPS * TILE)
    else:
        found = gl.load(places + step * WARPS * TILE, mask=(step * WARPS + p // (64 * ROWS) < end)[:, None])
    return found


@gluon.jit
def _load_pairs(
    places, step, group, end, WHOLE: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr
):
    """The scales and zeros of a group of it, scales of 0 from tile `end` on."""
    q = gl.arange(0, 8 * ROWS * WARPS, layout=gl.SliceLayout(1, pair_layout(ROWS, WARPS)))
    offset = (step * WARPS * GROUPS + group) * 64
    if WHOLE:
        found = gl.load(places + offset)
    else:
        found = gl.load(places + offset, mask=(step * WARPS + q // (8 * ROWS) < end)[:, None], other=0)
    return found


@gluon.jit
def _normed(total, factor, eps, WIDTH: gl.constexpr):
    """`reference.rms_norm` of one row: the steps of `norm._norm`."""
    wide = total.to(gl.float32)
    return (wide * gl.rsqrt(gl.sum(wide * wide, 0) / WIDTH + eps) * factor).to(total.dtype)


@gluon.jit
def _operands(shared, step, TOKENS: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr):
    """The inputs of tile `step` of each warp: eight operands [WARPS, 16, 8], tokens over and over to fill them."""
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    LAYOUT: gl.constexpr = _operand_layout(TOKENS, WARPS)
    whole = gl.zeros([TOKENS, 8 // TOKENS, WARPS, 1, 4, 8], shared.dtype, LAYOUT)
    found = ()
    for pair in gl.static_range(4):
        both, _ = gl.broadcast(shared.slice(step, 1, 1).slice(pair, 1, 3).load(LAYOUT), whole)
        both = both.reshape([TOKENS, 8 // TOKENS, WARPS, 2, 16]).permute([2, 4, 1, 0, 3])
        first, second = both.reshape([WARPS, 16, 8, 2]).split()
        found = found + (
            gl.convert_layout(first, B, assert_trivial=True),
            gl.convert_layout(second, B, assert_trivial=True),
        )
    return found


@gluon.jit(do_not_specialize=["m", "n", "tiles", "turns"])
def _stream(
    x_ptr,
    residual_ptr,
    norm_ptr,
    eps,
    total_ptr,
    words_ptr,
    scale_zero_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    tiles,
    turns,
    NORMS: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    STEPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Every num_programs-th turn of ROWS blocks of 16 rows of W: STEPS tiles a warp, loaded AHEAD tiles before use."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    ROW: gl.constexpr = gl.BlockedLayout([min(8, PADDED // (32 * WARPS))], [32], [WARPS], [0])
    GROUPS: gl.constexpr = 128 // GROUP
    turn = gl.program_id(0)
    WHOLE: gl.constexpr = WIDTH % (128 * WARPS) == 0
    words, pairs = (), ()
    word_places = word_pointers(words_ptr, turn * ROWS, 0, tiles, ROWS, WARPS)
    pair_places = pair_pointers(scale_zero_ptr, turn * ROWS, 0, tiles, 0, GROUPS, ROWS, WARPS)
    for step in gl.static_range(AHEAD):
        words = words + (_load_words(word_places, step, tiles, WHOLE, ROWS, WARPS),)
        for group in gl.static_range(GROUPS):
            pairs = pairs + (_load_pairs(pair_places, step, group, tiles, WHOLE, GROUPS, ROWS, WARPS),)
    column = gl.arange(0, PADDED, layout=ROW)
    if NORMS:
        factor = gl.load(norm_ptr + column, mask=column < WIDTH, other=0.0).to(gl.float32)
    if PDL:
        dependent_launch.depend()
    # [token, step, warp, 4, 4, 8]: what the rows of a matrix instruction's operand are lies in one run of memory.
    INPUTS: gl.constexpr = PADDED // (128 * WARPS)
    shared = gl.allocate_shared_memory(
        x_ptr.dtype.element_ty,
        [TOKENS, INPUTS, WARPS, 4, 4, 8],
        gl.SwizzledSharedLayout(1, 1, 1, [5, 0, 4, 3, 2, 1]),
    )
    found = ()
    for token in gl.static_range(TOKENS):
        inside = (column < WIDTH) & (token < m)
        row = gl.load(x_ptr + token * WIDTH + column, mask=inside, other=0.0)
        if NORMS:
            rest = gl.load(residual_ptr + token * WIDTH + column, mask=inside, other=0.0)
            row = (row.to(gl.float32) + rest.to(gl.float32)).to(row.dtype)
        found = found + (row,)
    for token in gl.static_range(TOKENS):
        row = found[token]
        if NORMS:
            inside = (column < WIDTH) & (token < m) & (turn == 0)
            gl.store(total_ptr + token * WIDTH + column, row, mask=inside)
            row = _normed(row, factor, eps, WIDTH)
        shared.slice(token, 1, 0).store(row.reshape([1, INPUTS, WARPS, 4, 4, 8]))
    barrier()
    while turn < turns:
        sums = gl.zeros([WARPS, 16 * ROWS, 8], gl.float32, MMA)
        following, end = turn + gl.num_programs(0), tiles
        for step in gl.static_range(STEPS):
            inputs = _operands(shared, step, TOKENS, WARPS, MMA)
            sums = multiply(sums, words[0], pairs[:GROUPS], inputs, x_ptr.dtype.element_ty, GROUPS, ROWS, WARPS, MMA)
            # What was used is replaced by what comes AHEAD tiles later, of the following turn near the end of one.
            if step + AHEAD == STEPS:
                word_places = word_pointers(words_ptr, following * ROWS, 0, tiles, ROWS, WARPS)
                pair_places = pair_pointers(scale_zero_ptr, following * ROWS, 0, tiles, 0, GROUPS, ROWS, WARPS)
                end = gl.where(following < turns, tiles, 0)
            words = words[1:] + (
                _load_words(word_places, (step + AHEAD) % STEPS, end, WHOLE and step + AHEAD < STEPS, ROWS, WARPS),
            )
            pairs = pairs[GROUPS:]
            for group in gl.static_range(GROUPS):
                pairs = pairs + (
                    _load_pairs(
                        pair_places,
                        (step + AHEAD) % STEPS,
                        group,
                        end,
                        WHOLE and step + AHEAD < STEPS,
                        GROUPS,
                        ROWS,
                        WARPS,
                    ),
                )
            in_order(WARPS)
        store(sums, turn * ROWS, bias_ptr, y_ptr, m, n, HAS_BIAS, GATED, ROWS, MMA)
        turn = following
