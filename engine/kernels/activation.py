# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
"""silu(gate) * up in Triton, and rounding of rows to int8."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts
from engine.kernels.rounding import largest_size, row_codes, row_scale

BLOCK = 1024
# Of a program that takes a row to int8
MOST_WARPS = 16
# Whether kernels are interpreted, where there are no instructions of a GPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# 1 / (1 + 2^(x * -log2 e)) of a float32. In instructions: what the compiler adds for denormal numbers and huge divisors
# is half of the time, and nothing here depends on it.
SIGMOID = tl.constexpr("""{
.reg .f32 e;
mul.f32 e, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 e, e;
add.f32 e, e, 0f3F800000;
rcp.approx.ftz.f32 $0, e;
}""")
# 1 / sqrt(8), in float32
ROOT = tl.constexpr(0.3535533905932738)


def silu_and_mul(gate_up: Tensor, *, in_turns: bool = False) -> Tensor:
    """The contract of `reference.silu_and_mul`; with `in_turns` eight columns of gate and eight of up follow one
    another, as `int4_weights.in_turns` puts them."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    count, inner = len(rows), rows.shape[1] // 2
    out = torch.empty(count, inner, dtype=gate_up.dtype, device=gate_up.device)
    if count:
        grid = (count, triton.cdiv(inner, BLOCK))  # only the first dimension goes beyond 65535
        _silu[grid](
            rows,
            out,
            rows.stride(0),
            inner,
            block=BLOCK,
            in_turns=in_turns,
            num_warps=4,
            **options(facts(rows.device)),
        )
    return out.view(*gate_up.shape[:-1], inner)


def silu_and_mul_int8(gate_up: Tensor, maxima: Tensor | None = None, rotated: int = 0) -> tuple[Tensor, Tensor]:
    """The contract of `reference.silu_and_mul_int8`."""
    return _to_int8(gate_up, maxima, gated=True, rotated=rotated)


def quantize_rows(x: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The contract of `reference.quantize_rows`."""
    return _to_int8(x, maxima, gated=False)


def row_maxima(x: Tensor, *, gated: bool, rotated: int = 0) -> Tensor:
    """The contract of `reference.row_maxima`."""
    maxima = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        _row_maxima[(len(x),)](x, maxima, x.stride(0), **_row_options(x, gated, rotated))
    return maxima


def _to_int8(x: Tensor, maxima: Tensor | None, *, gated: bool, rotated: int = 0) -> tuple[Tensor, Tensor]:
    shape = _row_options(x, gated, rotated)
    values = torch.empty(len(x), shape["width"], dtype=torch.int8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        known = scales if maxima is None else maxima
        _rows_to_int8[(len(x),)](x, values, scales, known, x.stride(0), given=maxima is not None, **shape)
    return values, scales


def _row_options(x: Tensor, gated: bool, rotated: int) -> dict[str, Any]:
    """How a kernel takes a row of [gate, up], or of values, to one program: a thread has 8 neighbours of each piece,
    which is 16 bytes of half floats, and stores their codes as they are."""
    width = x.shape[1] // 2 if gated else x.shape[1]
    piece = min(triton.next_power_of_2(width), MOST_WARPS * 256)
    shape = {"width": width, "piece": piece, "gated": gated, "rotated": rotated}
    return {**shape, "num_warps": max(piece // 256, 1), **options(facts(x.device))}


@triton.jit
def _sigmoid(x):
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gate(gate, up):
    wide = gate.to(tl.float32)
    return wide * _sigmoid(wide) * up.to(tl.float32)


@triton.jit
def _silu(gate_up, out, stride, inner, block: tl.constexpr, in_turns: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        depend()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < inner
    place, beyond = column, inner
    if in_turns:
        place, beyond = column // 8 * 16 + column % 8, 8
    gate = tl.load(gate_up + row * stride + place, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + beyond + place, mask=inside, other=0.0)
    tl.store(out + row * inner + column, _gate(gate, up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x):
    """`rotation.rotate` by blocks of 8 of x [n] float32: a thread has whole blocks, so that nothing moves."""
    size: tl.constexpr = x.shape[0] // 8
    # The last of three bits of a channel's place first, as there.
    even, odd = tl.split(tl.reshape(x, [size, 2, 2, 2]))
    a, b = tl.split(even + odd)
    c, d = tl.split(even - odd)
    a0, a1 = tl.split(a + b)
    b0, b1 = tl.split(a - b)
    c0, c1 = tl.split(c + d)
    d0, d1 = tl.split(c - d)
    sums = tl.join(tl.join(a0 + a1, a0 - a1), tl.join(b0 + b1, b0 - b1))
    differences = tl.join(tl.join(c0 + c1, c0 - c1), tl.join(d0 + d1, d0 - d1))
    return tl.reshape(tl.join(sums, differences), [size * 8]) * ROOT


@triton.jit
def _part(
    x,
    row,
    stride,
    first: tl.constexpr,
    width: tl.constexpr,
    piece: tl.constexpr,
    gated: tl.constexpr,
    rotated: tl.constexpr,
):
    """`piece` values of a row from `first` on, in float32, zeros beyond its end."""
    column = first + tl.arange(0, piece)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if gated:
        value = _gate(value, tl.load(x + row * stride + width + column, mask=inside, other=0.0))
    value = value.to(tl.float32)
    if rotated:
        tl.static_assert(rotated == 8, "there are kernels for blocks of 8 channels alone")
        value = _rotate(value)
    return value


@triton.jit
def _rows_to_int8(
    x,
    values,
    scales,
    maxima,
    stride,
    width: tl.constexpr,
    piece: tl.constexpr,
    gated: tl.constexpr,
    rotated: tl.constexpr,
    given: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        depend()
    row = tl.program_id(0).to(tl.int64)
    # In pieces, of which there need not be a power of two.
    parts, sizes = (), tl.zeros([piece], tl.float32)
    for first in tl.static_range(0, width, piece):
        part = _part(x, row, stride, first, width, piece, gated, rotated)
        parts = parts + (part,)  # noqa: RUF005  (Triton has no unpacking)
        if not given:
            sizes = tl.maximum(sizes, tl.abs(part), propagate_nan=tl.PropagateNan.ALL)
    scale = row_scale(tl.load(maxima + row) if given else largest_size(sizes))
    for first in tl.static_range(0, width, piece):
        column = first + tl.arange(0, piece)
        tl.store(values + row * width + column, row_codes(parts[first // piece], scale), mask=column < width)
    tl.store(scales + row, scale)


@triton.jit
def _row_maxima(
    x,
    maxima,
    stride,
    width: tl.constexpr,
    piece: tl.constexpr,
    gated: tl.constexpr,
    rotated: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        depend()
    row = tl.program_id(0).to(tl.int64)
    sizes = tl.zeros([piece], tl.float32)
    for first in tl.static_range(0, width, piece):
        part = _part(x, row, stride, first, width, piece, gated, rotated)
        sizes = tl.maximum(sizes, tl.abs(part), propagate_nan=tl.PropagateNan.ALL)
    largest = largest_size(sizes)
    tl.store(maxima + row, tl.where(largest == largest, largest, float("inf")))
