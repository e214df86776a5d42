# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""RMS norms in Triton: one program a row, the residual sum and the int8 rounding in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts
from engine.kernels.rounding import largest_size, row_codes, row_scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The contract of `reference.rms_norm`."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    _launch(rows, None, weight, eps, total=None, out=out, scales=None)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The contract of `reference.add_rms_norm`."""
    out, total = torch.empty_like(x), torch.empty_like(residual)
    _launch(x, residual, weight, eps, total=total, out=out, scales=None)
    return out, total


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The contract of `reference.rms_norm_int8`."""
    out, scales = _int8_rows(x)
    _launch(x, None, weight, eps, total=None, out=out, scales=scales)
    return out, scales


def add_rms_norm_int8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `reference.add_rms_norm_int8`."""
    out, scales = _int8_rows(x)
    total = torch.empty_like(residual)
    _launch(x, residual, weight, eps, total=total, out=out, scales=scales)
    return out, scales, total


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return values, torch.empty(len(x), dtype=torch.float32, device=x.device)


def float_warps(padded: int) -> int:
    """Warps of a program that norms so many numbers to floats."""
    return max(min(padded // 512, 16), 1)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    total: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    padded = triton.next_power_of_2(width)
    # Eight numbers a thread where they are rounded: their codes are stored by the thread that loaded them.
    warps = float_warps(padded) if scales is None else max(min(padded // 256, 32), 1)
    _norm[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out if total is None else total,
        out,
        out if scales is None else scales,
        x.stride(0),
        eps,
        width=width,
        padded=padded,
        adds=residual is not None,
        quantizes=scales is not None,
        num_warps=warps,
        **options(facts(x.device)),
    )


@triton.jit
def _norm(
    x,
    residual,
    weight,
    total,
    out,
    scales,
    x_stride,
    eps,
    width: tl.constexpr,
    padded: tl.constexpr,
    adds: tl.constexpr,
    quantizes: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, padded)
    inside = column < width
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        depend()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if adds:
        value = value.to(tl.float32) + tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, value, mask=inside)
    normed = normed_row(value, factor, eps, width)
    if quantizes:
        scale = row_scale(largest_size(tl.abs(normed)))
        tl.store(out + row * width + column, row_codes(normed, scale), mask=inside)
        tl.store(scales + row, scale)
    else:
        tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normed_row(value, factor, eps, width: tl.constexpr):
    """The RMS norm in float32 of a row of `width` numbers, zeros behind them."""
    wide = value.to(tl.float32)
    return wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps) * factor
