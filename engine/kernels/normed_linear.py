"""Products of what is made of rows first, in one kernel where rows are few, else in two.

Made are the RMS norm of the residual stream, and int8 rows: of that, of floats, or of gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from engine.kernels import activation, int4_linear, int8_linear, tuning
from engine.kernels.device import Device, facts
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.norm import add_rms_norm, add_rms_norm_int8
from engine.kernels.tuning import Config

# Up to so many rows are made by the product, on a card without a table; those of silu * up, which has not been timed on
# a card yet, where a table says so.
FEW_ROWS = 4
# More rows than that are never made by the product, and need no row in a table.
MOST_ROWS = 8
# Two kernels; the product runs by its own table.
APART = {"kernel": "apart"}


def normed_int4_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weights: Int4Weights,
    bias: Tensor | None = None,
    config: Config | None = None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`int4_linear` of what `add_rms_norm` gives for delta and residual [M, in], and their sum [M, in].

    In one kernel the squares of a row are summed in another order, unless there are 512 inputs a warp: where sums
    differ in their last bit, so may some of the normed numbers. `config` overrides the table of the device.
    """
    m, device = len(delta), facts(delta.device)
    if config is None and m <= MOST_ROWS:
        config = tuning.lookup("normed_int4_linear", device.name, weights.out_features, weights.in_features, m)
    fused = _int4_kernel(device, m, delta.dtype, weights)
    if config is None and fused is not None and m <= FEW_ROWS:
        config = fused.default_config(m, weights, device)
    if config is None or config["kernel"] == "apart" or fused is None:
        normed, total = add_rms_norm(delta, residual, norm, eps)
        return int4_linear.int4_linear(normed, weights, bias, gated=gated), total
    y, total = fused.run_normed(delta, residual, norm, eps, weights, bias, config, gated=gated)
    return y, total


def normed_int8_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`int8_linear` of what `add_rms_norm_int8` gives for delta and residual [M, in], and their sum, in their type.

    What `normed_int4_linear` says of sums of squares is true here too, with 256 inputs a warp.
    """
    config, gemv = _int8_config("normed_int8_linear", delta, weight, config)
    if gemv is None:
        values, scales, total = add_rms_norm_int8(delta, residual, norm, eps)
        return int8_linear.int8_linear(values, scales, weight, weight_scales, bias, delta.dtype), total
    y, total = gemv.multiply_normed(delta, residual, norm, eps, weight, weight_scales, bias, config)
    return y, total


def rounded_int8_linear(
    x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """`int8_linear` of what `quantize_rows` gives for x [M, in], in its type."""
    config, gemv = _int8_config("rounded_int8_linear", x, weight, config)
    if gemv is None:
        return int8_linear.int8_linear(*activation.quantize_rows(x), weight, weight_scales, bias, x.dtype)
    y: Tensor = gemv.multiply_rows(x, weight, weight_scales, bias, config)
    return y


def gated_int8_linear(
    gate_up: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    config: Config | None = None,
    *,
    rotated: int = 0,
) -> Tensor:
    """`int8_linear` of what `silu_and_mul_int8` gives for gate_up [M, 2 * in], in its type."""
    config, gemv = _int8_config("gated_int8_linear", gate_up, weight, config)
    if gemv is None:
        rows = activation.silu_and_mul_int8(gate_up, rotated=rotated)
        return int8_linear.int8_linear(*rows, weight, weight_scales, bias, gate_up.dtype)
    y: Tensor = gemv.multiply_gated(gate_up, weight, weight_scales, bias, config, rotated=rotated)
    return y


def int4_candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations of `normed_int4_linear` that tuning tries for m rows."""
    stream = int4_linear.fragment_kernels(device).get("stream")
    return [APART, *(stream.candidates(m, n, k, device) if stream is not None else ())]


def int8_candidates(m: int, device: Device) -> Sequence[Config]:
    """The same of `normed_int8_linear`, `rounded_int8_linear` and `gated_int8_linear`."""
    gemv = int8_linear.gemv_module(device)
    return [APART, *(gemv.candidates(m, device) if gemv is not None else ())]


def _int8_config(op: str, x: Tensor, weight: Tensor, config: Config | None) -> tuple[Config, ModuleType | None]:
    """How rows made of x are multiplied: a configuration, and the module of the one kernel, or none where there are
    two."""
    m, (n, k), device = len(x), weight.shape, facts(x.device)
    gated = op == "gated_int8_linear"
    if config is None and m <= MOST_ROWS:
        config = tuning.lookup(op, device.name, n, k, m)
    gemv = int8_linear.gemv_module(device)
    if gemv is None or not gemv.runs(m, k, device):
        return APART, None
    if config is None:
        config = gemv.default_config(device) if m <= FEW_ROWS and not gated else APART
    return config, None if config["kernel"] == "apart" else gemv


def _int4_kernel(device: Device, m: int, dtype: torch.dtype, weights: Int4Weights) -> ModuleType | None:
    """The module of the one kernel, where it can do this product."""
    stream = int4_linear.fragment_kernels(device).get("stream")
    return stream if stream is not None and m and stream.runs(m, dtype, weights, device) else None
