"""Activation-aware scales (Lin et al. 2023): input channels that matter are made large before weights are rounded.

A scale s multiplies the input channels of the weights of a pair and divides what feeds them. `reference_scale` is
the fixed formula of LMDeploy v0.1.0; `candidates` are s = a^x / w^y over exponents, for a search to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A scale float32 [in] of a pair, and the exponents of activation and weight that it came from."""

    x: float
    y: float
    scale: Tensor


LARGEST = 1e4  # of a scale, and its inverse the smallest: keeps scaled weights and norms far from float16's ends


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


def candidates(
    activation: Tensor, weight: Tensor, exponents: Sequence[tuple[float, float]], storable: Callable[[Tensor], Tensor]
) -> list[Candidate]:
    """No scaling, then the scale of each of `exponents` (x, y) as `storable` makes it: one that can be had exactly.

    `activation` and `weight` are [channels]; `storable` turns a wished-for scale [channels] into the float32 one [in],
    such as the quotient of a norm's weight before and after it is rounded.
    """
    tries = [(0.0, 0.0), *(pair for pair in exponents if pair != (0.0, 0.0))]
    return [Candidate(x=x, y=y, scale=storable(grid_scale(activation, weight, x, y))) for x, y in tries]
