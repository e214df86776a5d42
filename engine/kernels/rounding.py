# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Rounding in Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: added to a float32 of magnitude below 2^22 it rounds halves to even, and the whole number is in the low
# bits of the sum.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def largest_size(sizes):
    """The largest of the magnitudes [n] float32; what is not a number counts as larger than all.

    The bits of magnitudes are in their order, and a warp has an instruction for the largest of whole numbers.
    """
    return tl.max(sizes.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def row_scale(largest):
    """The scale of `reference.quantize_rows` for a row's largest magnitude; NaN where that is not finite."""
    scale = tl.div_rn(tl.maximum(largest, 1e-7), 127.0)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def row_codes(x, scale):
    """The codes of `reference.quantize_rows` of x float32, of which no magnitude is above 127.4 scales.

    x / scale is taken by one reciprocal a row and corrected by its remainder: codes are those of a division that is
    rounded to nearest, for every scale and x (tests/engine/kernels/test_row_codes.py tries all that could differ). A
    division of each number would be a branch each, no two of which overlap.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(quotient, -scale, x), inverse, quotient)
    return (quotient + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
