"""Scales of the int8 KV cache: one scale and zero point per layer and tensor-parallel rank, over the rank's heads.

A stored byte is `round((x - zero) / scale) + 128`: `zero = (min + max) / 2`, `scale = (max - min) / 255`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STEPS = 255
SYMMETRIC_STEPS = 127


def scale_and_zero(low: Tensor, high: Tensor, *, symmetric: bool = False) -> tuple[float, float]:
    """Scale and zero point of values between `low` and `high` (any shapes), in float32.

    Symmetric ones have zero point 0 and reach to the largest magnitude. The scale is never 0: for a range that is one
    value it is that value's float32 precision, and the value itself, as the zero point, is exact.
    """
    least, most = low.float().min(), high.float().max()
    if not bool(torch.isfinite(least) and torch.isfinite(most)):
        raise ValueError("the recorded range of the KV cache is not finite: calibrate again")
    zero = torch.zeros(()) if symmetric else (least + most) / 2
    span = torch.maximum(-least, most) / SYMMETRIC_STEPS if symmetric else (most - least) / STEPS
    smallest = torch.maximum(zero.abs(), torch.ones(())) * torch.finfo(torch.float32).eps
    return float(torch.maximum(span, smallest)), float(zero)


def scale_and_zero_as_reference(low: Tensor, high: Tensor) -> tuple[float, float]:
    """LMDeploy v0.1.0's arithmetic for statistics recorded in float16: every step is rounded to float16."""
    least, most = low.half().min(), high.half().max()
    return float((most - least) / STEPS), float((most + least) / 2)


def smoothed_range(low: Tensor, high: Tensor, smoothing: Tensor | None) -> tuple[Tensor, Tensor]:
    """V's range [kv_heads, head_dim] once v_proj's outputs are divided by `smoothing` [kv_heads * head_dim]: exact."""
    if smoothing is None:
        return low, high
    divisor = smoothing.view(low.shape)
    return low / divisor, high / divisor


def layer_scales(
    statistics: Mapping[str, Tensor],
    layer: int,
    *,
    tp: int,
    smoothing: Tensor | None = None,
    symmetric: bool = False,
) -> list[tuple[float, float, float, float]]:
    """(k_scale, k_zero, v_scale, v_zero) of each rank, from calibration's statistics of the unsmoothed model.

    Raises ValueError where the KV heads cannot be divided over the ranks.
    """
    module = f"model.layers.{layer}"
    key_low, key_high = statistics[f"key/min/{module}"], statistics[f"key/max/{module}"]
    value_low, value_high = smoothed_range(
        statistics[f"value/min/{module}"], statistics[f"value/max/{module}"], smoothing
    )
    if len(key_low) % tp:
        raise ValueError(f"{len(key_low)} KV heads cannot be divided over tp={tp} ranks: choose a tp that divides them")
    ranks = zip(*(tensor.chunk(tp) for tensor in (key_low, key_high, value_low, value_high)), strict=True)
    return [
        (*scale_and_zero(k_low, k_high, symmetric=symmetric), *scale_and_zero(v_low, v_high, symmetric=symmetric))
        for k_low, k_high, v_low, v_high in ranks
    ]
