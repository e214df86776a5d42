"""Activation-aware scales (Lin et al. 2023): input channels that matter are made large before weights are rounded.

A scale s multiplies the input channels of the weights of a pair and divides what feeds them. `reference_scale` is
the fixed formula of LMDeploy v0.1.0; `search_scale` tries s = a^x / w^y over exponents and keeps the one with the
smallest output error, measured by the Gram matrix of the inputs, whose cost does not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.quant.stream import Workers
from pipelines.quant.w4a16.rounding import round_groups

LARGEST = 1e4  # of a scale, and its inverse the smallest: keeps scaled weights and norms far from float16's ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A searched scale, float32 [in], and the relative output errors without scaling and with it."""

    activation_exponent: float
    weight_exponent: float
    scale: Tensor
    unscaled_error: float
    error: float


def reference_scale(weights: Sequence[Tensor], absmax: Tensor, *, group_size: int, alpha: float) -> Tensor:
    """a^alpha / w^(1-alpha), normalised, in the arithmetic and type of the weights; a is the inputs' absmax [in].

    The reference's alpha is 0.5.

    Channels that are never active or have no weight take 1, where the reference divides by zero.
    """
    stacked = torch.cat(list(weights), dim=0)
    activation, weight = absmax.to(stacked.dtype), mean_in_group(stacked, group_size)
    alive = (activation > 0) & (weight > 0)
    one = torch.ones_like(weight)
    scale = torch.where(alive, activation, one) ** alpha / torch.where(alive, weight, one) ** (1 - alpha)
    if bool(alive.any()):
        scale = scale / (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale, one)


def mean_in_group(weight: Tensor, group_size: int) -> Tensor:
    """How large each input channel [in] of [out, in] is within its groups: the mean over rows of |w| / max|w|."""
    groups = weight.abs().view(-1, group_size)
    largest = groups.amax(dim=1, keepdim=True)
    return (groups / torch.where(largest > 0, largest, torch.ones_like(largest))).view(weight.shape).mean(dim=0)


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


def output_error(weights: Sequence[Tensor], scale: Tensor, gram: Tensor, group_size: int) -> float:
    """Sum over the outputs of the squared error that rounding `weight * scale` makes: trace(dW G dW^T)."""
    total = 0.0
    for weight in weights:
        difference = round_groups(weight * scale, group_size).div_(scale).sub_(weight)
        total += float(((difference @ gram) * difference).sum())
    return total


def output_power(weights: Sequence[Tensor], gram: Tensor) -> float:
    """Sum of the squared outputs themselves, which errors are given in parts of."""
    return sum(float(((weight @ gram) * weight).sum()) for weight in weights)


def search_scale(
    weights: Sequence[Tensor],
    gram: Tensor,
    *,
    group_size: int,
    activation: Tensor,
    channel_weight: Tensor,
    exponents: Sequence[tuple[float, float]],
    storable: Callable[[Tensor], Tensor],
    workers: Workers,
) -> Choice:
    """The best of `exponents` (pairs x, y) and of no scaling, for float32 weights [out, in] that share an input.

    `storable` turns a wished-for scale [channels] into the float32 one [in] that can be had exactly, such as the
    quotient of a norm's weight before and after it is rounded. Among equals the first wins, no scaling before all.
    """
    tries = [(0.0, 0.0), *(pair for pair in exponents if pair != (0.0, 0.0))]

    def one(index: int) -> tuple[float, Tensor]:
        scale = storable(grid_scale(activation, channel_weight, *tries[index]))
        return output_error(weights, scale, gram, group_size), scale

    results = list(workers.in_order(one, len(tries)))
    best = min(range(len(tries)), key=lambda i: results[i][0])
    power = output_power(weights, gram) or 1.0
    return Choice(
        activation_exponent=tries[best][0],
        weight_exponent=tries[best][1],
        scale=results[best][1],
        unscaled_error=results[0][0] / power,
        error=results[best][0] / power,
    )
