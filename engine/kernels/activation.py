# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""silu(gate) * up in Triton, and rounding of rows to int8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts
from engine.kernels.rounding import round_row

BLOCK = 1024


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


def silu_and_mul_int8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `reference.silu_and_mul_int8`."""
    return _to_int8(gate_up, gate_up.shape[1] // 2, gated=True)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `reference.quantize_rows`."""
    return _to_int8(x, x.shape[1], gated=False)


def _to_int8(x: Tensor, width: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    count = len(x)
    values = torch.empty(count, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        padded = triton.next_power_of_2(width)
        warps = min(max(padded // 512, 1), 16)
        _rows_to_int8[(count,)](
            x,
            values,
            scales,
            x.stride(0),
            width=width,
            padded=padded,
            gated=gated,
            num_warps=warps,
            **options(facts(x.device)),
        )
    return values, scales


@triton.jit
def _gate(gate, up):
    wide = gate.to(tl.float32)
    return wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)


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
def _rows_to_int8(
    x, values, scales, stride, width: tl.constexpr, padded: tl.constexpr, gated: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        depend()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, padded)
    inside = column < width
    value = tl.load(x + row * stride + column, mask=inside, other=0.0)
    if gated:
        value = _gate(value, tl.load(x + row * stride + width + column, mask=inside, other=0.0))
    code, scale = round_row(value.to(tl.float32))
    tl.store(values + row * width + column, code, mask=inside)
    tl.store(scales + row, scale)
