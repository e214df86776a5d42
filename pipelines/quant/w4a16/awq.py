"""Activation-aware scales (Lin et al. 2023): input channels that matter are made large before weights are rounded.

`candidates` are scales s = a^x / w^y over exponents, for a search to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipelines.quant.scales import grid_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A scale float32 [in] of a pair, and the exponents of activation and weight that it came from."""

    x: float
    y: float
    scale: Tensor


def candidates(
    activation: Tensor, weight: Tensor, exponents: Sequence[tuple[float, float]], storable: Callable[[Tensor], Tensor]
) -> list[Candidate]:
    """No scaling, then the scale of each of `exponents` (x, y) as `storable` makes it: one that can be had exactly.

    `activation` and `weight` are [channels]; `storable` turns a wished-for scale [channels] into the float32 one [in],
    such as the quotient of a norm's weight before and after it is rounded.
    """
    tries = [(0.0, 0.0), *(pair for pair in exponents if pair != (0.0, 0.0))]
    return [Candidate(x=x, y=y, scale=storable(grid_scale(activation, weight, x, y))) for x, y in tries]
