"""Scales that move size from the inputs of linears into their weights, or back: what AWQ and SmoothQuant share.

A scale s multiplies the input channels of the weights of a pair and divides what feeds them (`pipelines.quant.pairs`).
`grid_scale` is s = a^x / w^y for exponents to choose from; `smooth_as_reference` is the fixed formula of LMDeploy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models import names
from pipelines.quant.pairs import ATTENTION_OUT, PAIRS, divide_outputs

LARGEST = 1e4  # of a scale, and its inverse the smallest: keeps scaled weights and norms far from float16's ends


def grid_scale(activation: Tensor, weight: Tensor, x: float, y: float) -> Tensor:
    """activation^x / weight^y, float32, with the geometric mean of its largest and smallest value at 1.

    Channels that are never active or have no weight take 1.
    """
    alive = (activation > 0) & (weight > 0)
    one = torch.ones_like(activation)
    if not bool(alive.any()):
        return one
    scale = torch.where(alive, activation, one) ** x / torch.where(alive, weight, one) ** y
    scale = scale / (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale.clamp(1 / LARGEST, LARGEST), one)


def mean_in_group(weight: Tensor, group_size: int) -> Tensor:
    """How large each input channel [in] of [out, in] is within its groups: the mean over rows of |w| / max|w|."""
    groups = weight.abs().view(-1, group_size)
    largest = groups.amax(dim=1, keepdim=True)
    return (groups / torch.where(largest > 0, largest, torch.ones_like(largest))).view(weight.shape).mean(dim=0)


def norm_quotient(norm: Tensor, scale: Tensor, stored: torch.dtype) -> Tensor:
    """The float32 scale that a norm's weight is really divided by once the result is rounded to what is stored."""
    divided = (norm / scale).to(stored).float()
    usable = (divided != 0) & torch.isfinite(divided)
    one = torch.ones_like(scale)
    return torch.where(usable, norm / torch.where(usable, divided, one), one)


def reference_scale(weights: Sequence[Tensor], absmax: Tensor, *, group_size: int | None, alpha: float) -> Tensor:
    """a^alpha / w^(1-alpha), normalised, in the arithmetic and type of the weights; a is the inputs' absmax [in].

    `group_size` None is a whole row. The reference's alpha is 0.5.

    Channels that are never active or have no weight take 1, where the reference divides by zero.
    """
    stacked = torch.cat(list(weights), dim=0)
    activation, weight = absmax.to(stacked.dtype), mean_in_group(stacked, group_size or stacked.shape[1])
    alive = (activation > 0) & (weight > 0)
    one = torch.ones_like(weight)
    scale = torch.where(alive, activation, one) ** alpha / torch.where(alive, weight, one) ** (1 - alpha)
    if bool(alive.any()):
        scale = scale / (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale, one)


def smooth_as_reference(
    tensors: Mapping[str, Tensor],
    absmax: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    group_size: int | None,
    alpha: float,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]]]:
    """LMDeploy's `smooth_layers` of one layer, in the arithmetic of `dtype`; `absmax` [in] by linear.

    The scaled tensors, the float32 scale [channels] that the outputs of a linear were divided by, by its name, and a
    report with a row per pair. With grouped-query attention v_proj and o_proj are left as they are, as there.
    """
    scaled = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    smoothing: dict[str, Tensor] = {}
    report: list[dict[str, Any]] = []
    for pair in PAIRS:
        if pair is ATTENTION_OUT and config.num_heads != config.num_kv_heads:
            report.append({"pair": pair.name, "skipped": "grouped-query attention"})
            continue
        weights = [scaled[f"{module}.weight"] for module in pair.after]
        scale = reference_scale(weights, absmax[pair.after[0]], group_size=group_size, alpha=alpha)
        scaled |= divide_outputs(scaled, pair.before, scale)
        for module in pair.after:
            scaled[f"{module}.weight"] = scaled[f"{module}.weight"] * scale
        if pair.before in names.LINEARS:
            smoothing[pair.before] = scale.float()
        report.append({"pair": pair.name, "activation_exponent": alpha, "weight_exponent": 1 - alpha})
    return scaled, smoothing, report
