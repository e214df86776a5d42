# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Rounding in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: added to a float32 of magnitude below 2^22 and taken away, it rounds halves to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_row(x):
    """`reference.quantize_rows` of one row in float32: codes and scale."""
    size = tl.abs(x)
    # A maximum passes over what is not a number; such a row's scale is not to be finite.
    return round_by(x, tl.max(tl.where(size == size, size, float("inf")), axis=0))


@triton.jit
def round_by(x, largest):
    """The same of a part of a row whose largest magnitude is known."""
    scale = tl.div_rn(tl.maximum(largest, 1e-7), 127.0)
    step = tl.minimum(tl.maximum(tl.div_rn(x, scale), -127.0), 127.0)
    return ((step + ROUNDER) - ROUNDER).to(tl.int8), scale
