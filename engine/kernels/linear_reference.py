"""The int4 and dense matrix products in plain torch: the specification of the kernels of the same names.

`int8_linear` is in `reference`, beside the rows that it multiplies.
"""

from __future__ import annotations

from torch import Tensor

from engine.kernels.int4_weights import Int4Weights


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [..., in] float16, bfloat16 or float32; [..., out] of x's type, summed in float32.

    W is rounded to x's type, as a dense weight of that type would hold it.
    """
    return dense_linear(x, weights.dequantize(x.dtype), bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [..., in] and weight [out, in] of one type; summed in float32, rounded once."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)
