"""Matrix products in plain torch: the specification of the kernels of the same names.

`int8_linear` is in `reference`, beside the rows that it multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.int4_weights import Int4Weights


def gated_int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up [..., out / 2] of the outputs of `int4_linear`, of which eight of gate and eight of up follow one
    another; rounded once."""
    y = int4_linear(x.float(), weights, None if bias is None else bias.float())
    gate, up = y.view(*y.shape[:-1], weights.out_features // 16, 2, 8).unbind(-2)
    gated: Tensor = torch.nn.functional.silu(gate) * up
    return gated.flatten(-2).to(x.dtype)


def int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [..., in] float16, bfloat16 or float32; [..., out] of x's type, summed in float32.

    W is rounded to x's type, as a dense weight of that type would hold it.
    """
    return dense_linear(x, weights.dequantize(x.dtype), bias)


def normed_int4_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weights: Int4Weights,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """The product of `reference.rms_norm` of total = residual + delta [M, in], and total; both of their type."""
    total = residual + delta
    product = gated_int4_linear if gated else int4_linear
    return product(reference.rms_norm(total, norm, eps), weights, bias), total


def normed_int8_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.int8_linear` of `reference.rms_norm_int8` of total = residual + delta [M, in], and total."""
    total = residual + delta
    rows = reference.rms_norm_int8(total, norm, eps)
    return reference.int8_linear(*rows, weight, weight_scales, bias, delta.dtype), total


def rounded_int8_linear(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.int8_linear` of `reference.quantize_rows` of x [M, in], in its type."""
    return reference.int8_linear(*reference.quantize_rows(x), weight, weight_scales, bias, x.dtype)


def gated_int8_linear(
    gate_up: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None = None, rotated: int = 0
) -> Tensor:
    """`reference.int8_linear` of `reference.silu_and_mul_int8` of gate_up [M, 2 * in], in its type."""
    rows = reference.silu_and_mul_int8(gate_up, rotated=rotated)
    return reference.int8_linear(*rows, weight, weight_scales, bias, gate_up.dtype)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [..., in] and weight [out, in] of one type; summed in float32, rounded once."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)
