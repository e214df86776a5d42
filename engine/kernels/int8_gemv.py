# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment,var-annotated"
# ruff: noqa: RUF005  (Gluon has no unpacking)
"""y = x W^T of int8 and up to four rows of x, which the kernel can make itself by rounding rows of floats, silu(gate) *
up, or the RMS norm of the residual stream. The time is that of reading W.

Every program keeps the codes of x in shared memory. A warp has whole rows of W, and goes on to further ones without a
pause in its loads; four products are one instruction (dp4a). For NVIDIA cards from sm_80.
(Above 300 lines: one kernel with four sources of x, a function each.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan

from engine.kernels import dependent_launch
from engine.kernels.device import Device, facts
from engine.kernels.int4_fragments import silu
from engine.kernels.load_order import barrier, in_order
from engine.kernels.tuning import Config

MOST_ROWS = 4
# What the codes of x may take of a multiprocessor's shared memory, so that several programs fit.
MOST_BYTES = 64 * 1024
# 1.5 * 2^23: see engine.kernels.rounding.
ROUNDER = gl.constexpr(12582912.0)
# A maximum passes on what is not a number.
ALL = gl.constexpr(PropagateNan.ALL)
# 1 / sqrt(8)
ROOT = gl.constexpr(0.3535533905932738)


def runs(m: int, k: int, device: Device) -> bool:
    """Whether this kernel can do a product here."""
    fits = _padded(m) * max(_padded(k), 512) <= MOST_BYTES
    return 1 <= m <= MOST_ROWS and device.capability >= (8, 0) and k % 16 == 0 and fits


def default_config(device: Device) -> dict[str, Any]:
    """rows: of W a warp at a time; warps a program; chunks of 512 inputs ahead of each warp; programs in all."""
    return {"kernel": "gemv", "rows": 2, "warps": 8, "ahead": 8, "programs": 2 * device.multiprocessors}


def candidates(m: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries."""
    if m > MOST_ROWS:
        return []
    return [
        {"kernel": "gemv", "rows": rows, "warps": warps, "ahead": ahead, "programs": share * device.multiprocessors}
        for rows, warps, ahead, shares in (
            (1, 8, 8, (2, 3)),
            (1, 16, 8, (1, 2)),
            (2, 8, 4, (2, 3)),
            (2, 8, 8, (1, 2)),
            (2, 16, 4, (1,)),
            (4, 8, 2, (2,)),
            (4, 8, 4, (1, 2)),
        )
        for share in shares
    ]


def multiply_codes(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype, c: Config
) -> Tensor:
    """The contract of `reference.int8_linear`, M up to 4."""
    y = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    _launch("codes", x.contiguous().view(torch.int32), None, None, 0.0, None, x_scales, weight, w_scales, bias, y, c)
    return y


def multiply_rows(x: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, c: Config) -> Tensor:
    """The same of `reference.quantize_rows`, for x [M, in] float16 or bfloat16; [M, out] of its type."""
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    _launch("rows", x.contiguous(), None, None, 0.0, None, None, weight, w_scales, bias, y, c)
    return y


def multiply_gated(
    gate_up: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, c: Config, *, rotated: int = 0
) -> Tensor:
    """The same of `reference.silu_and_mul_int8`, for gate_up [M, 2 in] float16 or bfloat16."""
    y = torch.empty(len(gate_up), len(weight), dtype=gate_up.dtype, device=gate_up.device)
    source = "rotated" if rotated else "gated"
    _launch(source, gate_up.contiguous(), None, None, 0.0, None, None, weight, w_scales, bias, y, c)
    return y


def multiply_normed(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    c: Config,
) -> tuple[Tensor, Tensor]:
    """The same of `reference.rms_norm_int8` of total = residual + delta [M, in], and total."""
    y = torch.empty(len(delta), len(weight), dtype=delta.dtype, device=delta.device)
    total = torch.empty_like(residual)
    delta, residual = delta.contiguous(), residual.contiguous()
    _launch("norm", delta, residual, norm, eps, total, None, weight, w_scales, bias, y, c)
    return y, total


def _launch(
    source: str,
    x: Tensor,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    total: Tensor | None,
    x_scales: Tensor | None,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
) -> None:
    (m, n), k = y.shape, weight.shape[1]
    rows, warps, steps = config["rows"], config["warps"], -(-k // 512)
    turns = -(-n // (rows * warps))
    _gemv[(min(config["programs"], turns),)](
        x,
        x if residual is None else residual,
        x if norm is None else norm,
        eps,
        y if total is None else total,
        w_scales if x_scales is None else x_scales,
        weight.contiguous().view(torch.int32),
        w_scales,
        y if bias is None else bias,
        y,
        m,
        n,
        turns,
        SOURCE=source,
        HAS_BIAS=bias is not None,
        WIDTH=k,
        PADDED=max(_padded(k), 512),
        TOKENS=_padded(m),
        ROWS=rows,
        WARPS=warps,
        AHEAD=min(config["ahead"], steps),
        STEPS=steps,
        num_warps=warps,
        **dependent_launch.options(facts(y.device)),
    )


def _padded(size: int) -> int:
    """The power of two that holds it."""
    return 1 << (size - 1).bit_length()


@gluon.jit
def _load_chunk(w_ptr, turn, step, turns, n, WIDTH: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """int32 [ROWS * WARPS, 128], each of four inputs: chunk `step` of a turn's rows. Past the last row is the last."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS, 4], [1, 32], [WARPS, 1], [1, 0])
    row = turn * (ROWS * WARPS) + gl.arange(0, ROWS * WARPS, layout=gl.SliceLayout(1, LAYOUT))
    column = step * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    first = gl.minimum(row, n - 1).to(gl.int64) * (WIDTH // 4)
    mask = (column < WIDTH // 4) & (turn < turns)
    return gl.load(w_ptr + first[:, None] + column[None, :], mask=mask[None, :], other=0)


@gluon.jit
def _codes(x, scale):
    """`rounding.row_codes` as words of four codes."""
    inverse = gl.div_rn(1.0, scale)
    quotient = x * inverse
    quotient = gl.fma(gl.fma(quotient, -scale, x), inverse, quotient)
    code = (quotient + ROUNDER).to(gl.int32, bitcast=True) & 255
    even, odd = code.reshape([x.shape[0] // 4, 2, 2]).split()
    low, high = (even | (odd << 8)).split()
    return low | (high << 16)


@gluon.jit
def _rotate(x):
    """`rotation.rotate` by blocks of 8, which a thread has in whole; see `activation._rotate`."""
    even, odd = x.reshape([x.shape[0] // 8, 2, 2, 2]).split()
    a, b = (even + odd).split()
    c, d = (even - odd).split()
    a0, a1 = (a + b).split()
    b0, b1 = (a - b).split()
    c0, c1 = (c + d).split()
    d0, d1 = (c - d).split()
    sums = gl.join(gl.join(a0 + a1, a0 - a1), gl.join(b0 + b1, b0 - b1))
    differences = gl.join(gl.join(c0 + c1, c0 - c1), gl.join(d0 + d1, d0 - d1))
    return gl.join(sums, differences).reshape([x.shape[0]]) * ROOT


@gluon.jit
def _scale(sizes):
    """`rounding.row_scale` of the `rounding.largest_size` of magnitudes."""
    largest = gl.max(sizes.to(gl.int32, bitcast=True), 0).to(gl.float32, bitcast=True)
    scale = gl.div_rn(gl.maximum(largest, 1e-7), 127.0)
    return gl.where(largest < float("inf"), scale, float("nan"))


@gluon.jit
def _dot(words, codes, sums):
    """sums plus the products of four codes each."""
    return gl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [words, codes, sums], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit(do_not_specialize=["m", "n", "turns"])
def _gemv(
    x_ptr,
    residual_ptr,
    norm_ptr,
    eps,
    total_ptr,
    x_scales,
    w_ptr,
    w_scales,
    bias_ptr,
    y_ptr,
    m,
    n,
    turns,
    SOURCE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WIDTH: gl.constexpr,
    PADDED: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    AHEAD: gl.constexpr,
    STEPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Every num_programs-th turn of ROWS rows of W a warp: STEPS chunks, loaded AHEAD chunks before use.

    SOURCE: x is "codes", int32 words of four with scales; "rows" of floats; "gated", gate and up side by side, and
    "rotated" the same by blocks of 8; or the "norm" of residual + x.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS, 4], [1, 32], [WARPS, 1], [1, 0])
    turn = gl.program_id(0)
    words = ()
    for step in gl.static_range(AHEAD):
        words = words + (_load_chunk(w_ptr, turn, step, turns, n, WIDTH, ROWS, WARPS),)
    ACTIVATED: gl.constexpr = SOURCE == "gated" or SOURCE == "rotated"
    LEAST: gl.constexpr = 8 if SOURCE == "rotated" else 4
    ROW: gl.constexpr = gl.BlockedLayout([min(8, max(PADDED // (32 * WARPS), LEAST))], [32], [WARPS], [0])
    WORDS: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    column, word = gl.arange(0, PADDED, layout=ROW), gl.arange(0, PADDED // 4, layout=WORDS)
    if SOURCE == "norm":
        factor = gl.load(norm_ptr + column, mask=column < WIDTH, other=0.0).to(gl.float32)
    if PDL:
        dependent_launch.depend()
    shared = gl.allocate_shared_memory(gl.int32, [TOKENS, PADDED // 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    PIECE: gl.constexpr = min(PADDED, 256 * WARPS)
    PIECES: gl.constexpr = (WIDTH + PIECE - 1) // PIECE
    found, scales = (), ()
    for token in gl.static_range(TOKENS):
        if SOURCE == "codes":
            inside = (word < WIDTH // 4) & (token < m)
            found = found + (gl.load(x_ptr + token * (WIDTH // 4) + word, mask=inside, other=0),)
            scales = scales + (gl.load(x_scales + token, mask=token < m, other=0.0),)
        elif not ACTIVATED:
            inside = (column < WIDTH) & (token < m)
            value = gl.load(x_ptr + token * WIDTH + column, mask=inside, other=0.0)
            if SOURCE == "norm":
                rest = gl.load(residual_ptr + token * WIDTH + column, mask=inside, other=0.0)
                value = (value.to(gl.float32) + rest.to(gl.float32)).to(value.dtype)
            found = found + (value,)
    for token in gl.static_range(TOKENS):
        if SOURCE == "codes":
            codes = found[token]
            shared.slice(token, 1, 0).store(codes.reshape([1, PADDED // 4]))
        elif ACTIVATED:
            # In pieces, of which there need not be a power of two.
            parts, sizes = (), gl.zeros([PIECE], gl.float32, ROW)
            for piece in gl.static_range(PIECES):
                place = piece * PIECE + gl.arange(0, PIECE, layout=ROW)
                first, inside = x_ptr + token * (2 * WIDTH) + place, (place < WIDTH) & (token < m)
                gate = gl.load(first, mask=inside, other=0.0).to(gl.float32)
                part = silu(gate) * gl.load(first + WIDTH, mask=inside, other=0.0).to(gl.float32)
                if SOURCE == "rotated":
                    part = gl.convert_layout(_rotate(part), ROW, assert_trivial=True)
                parts, sizes = parts + (part,), gl.maximum(sizes, gl.abs(part), ALL)
            scale = _scale(sizes)
            for piece in gl.static_range(PIECES):
                codes = _codes(parts[piece], scale).reshape([1, PIECE // 4])
                shared.slice(token, 1, 0).slice(piece * (PIECE // 4), PIECE // 4, 1).store(codes)
            scales = scales + (scale,)
        else:
            wide = found[token].to(gl.float32)
            if SOURCE == "norm":
                inside = (column < WIDTH) & (token < m) & (turn == 0)
                gl.store(total_ptr + token * WIDTH + column, found[token], mask=inside)
                wide = wide * gl.rsqrt(gl.sum(wide * wide, 0) / WIDTH + eps) * factor
            scale = _scale(gl.abs(wide))
            codes = _codes(wide, scale)
            shared.slice(token, 1, 0).store(codes.reshape([1, PADDED // 4]))
            scales = scales + (scale,)
    barrier()  # the only one: from here on no warp waits for another
    nothing = gl.zeros([ROWS * WARPS, 128], gl.int32, LAYOUT)
    while turn < turns:
        sums = ()
        for _token in gl.static_range(TOKENS):
            sums = sums + (nothing,)
        following = turn + gl.num_programs(0)
        row = turn * (ROWS * WARPS) + gl.arange(0, ROWS * WARPS, layout=gl.SliceLayout(1, LAYOUT))
        w_scale = gl.load(w_scales + row, mask=row < n, other=0.0)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32)
        for step in gl.static_range(STEPS):
            for token in gl.static_range(TOKENS):
                chunk = shared.slice(token, 1, 0).slice(step * 128, 128, 1).load(LAYOUT)
                chunk, _ = gl.broadcast(chunk, nothing)
                # The tuple goes round once a chunk.
                sums = sums[1:] + (_dot(words[0], chunk, sums[0]),)
            # What was used is replaced by what comes AHEAD chunks later, of the following turn near the end of one.
            if step + AHEAD < STEPS:
                words = words[1:] + (_load_chunk(w_ptr, turn, step + AHEAD, turns, n, WIDTH, ROWS, WARPS),)
            else:
                words = words[1:] + (_load_chunk(w_ptr, following, step + AHEAD - STEPS, turns, n, WIDTH, ROWS, WARPS),)
            in_order(WARPS)
        for token in gl.static_range(TOKENS):
            y = gl.sum(sums[token], 1).to(gl.float32) * scales[token] * w_scale
            if HAS_BIAS:
                y += bias
            gl.store(y_ptr + token * n + row, y.to(y_ptr.dtype.element_ty), mask=(row < n) & (token < m))
        turn = following
