"""Scales of the int8 KV cache, for the heads of a tensor-parallel rank together, for a head, or for a channel of it.

A stored byte is `round((x - zero) / scale) + 128`: `zero = (min + max) / 2`, `scale = (max - min) / 255`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config import KVGranularity

STEPS = 255
SYMMETRIC_STEPS = 127


def pairs(low: Tensor, high: Tensor, *, symmetric: bool = False) -> Tensor:
    """Scale and zero point, float32 [..., 2], of values between `low` and `high` [...].

    Symmetric ones have zero point 0 and reach to the largest magnitude. The scale is never 0: for a range that is one
    value it is that value's float32 precision, and the value itself, as the zero point, is exact.
    """
    low, high = low.float(), high.float()
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the recorded range of the KV cache is not finite: calibrate again")
    zero = torch.zeros_like(low) if symmetric else (low + high) / 2
    span = torch.maximum(-low, high) / SYMMETRIC_STEPS if symmetric else (high - low) / STEPS
    smallest = zero.abs().clamp(min=1.0) * torch.finfo(torch.float32).eps
    return torch.stack([torch.maximum(span, smallest), zero], dim=-1)


def scale_and_zero(low: Tensor, high: Tensor, *, symmetric: bool = False) -> tuple[float, float]:
    """The one pair of all values between `low` and `high` (any shapes)."""
    scale, zero = pairs(low.min(), high.max(), symmetric=symmetric).tolist()
    return scale, zero


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
    ranges = _ranges(statistics, layer, smoothing)
    if len(ranges[0]) % tp:
        raise ValueError(
            f"{len(ranges[0])} KV heads cannot be divided over tp={tp} ranks: choose a tp that divides them"
        )
    return [
        (*scale_and_zero(k_low, k_high, symmetric=symmetric), *scale_and_zero(v_low, v_high, symmetric=symmetric))
        for k_low, k_high, v_low, v_high in zip(*(tensor.chunk(tp) for tensor in ranges), strict=True)
    ]


def fine_scales(
    statistics: Mapping[str, Tensor],
    layer: int,
    granularity: KVGranularity,
    *,
    smoothing: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """(k_scale, k_zero, v_scale, v_zero) of every channel, float32 [kv_heads, head_dim, 4], whatever the ranks.

    A `head` has one pair, repeated over its channels; a `channel` has its own.
    """
    if granularity not in ("head", "channel"):
        raise ValueError(f"the granularity {granularity} has no scales of heads or channels")
    found = []
    key_low, key_high, value_low, value_high = _ranges(statistics, layer, smoothing)
    for low, high in ((key_low, key_high), (value_low, value_high)):
        if granularity == "head":
            low, high = low.amin(1, keepdim=True).expand_as(low), high.amax(1, keepdim=True).expand_as(high)
        found.append(pairs(low, high, symmetric=symmetric))
    return torch.cat(found, dim=-1)


def _ranges(statistics: Mapping[str, Tensor], layer: int, smoothing: Tensor | None) -> tuple[Tensor, ...]:
    """Lowest and highest K, lowest and highest V of every channel: [kv_heads, head_dim] each."""
    module = f"model.layers.{layer}"
    value = smoothed_range(statistics[f"value/min/{module}"], statistics[f"value/max/{module}"], smoothing)
    return statistics[f"key/min/{module}"], statistics[f"key/max/{module}"], *value
