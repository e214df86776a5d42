"""Group quantization: a weight becomes 4-bit codes with one scale and one zero point per row and group of inputs.

The value of a code is `(code - zero) * scale`. The range of a group always takes in 0, so the zero point lies
in 0..15 whatever the signs of the group are, and a group of equal values is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: what scales are stored in
LARGEST_SCALE = 65504.0  # the largest float16


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCodes:
    """`codes` uint8 [out, in] and `zeros` uint8 [out, groups] in 0..15, `scales` float32 [out, groups]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for with scales as they are stored (float16): float32 [out, in]."""
        out, groups = self.zeros.shape
        codes = self.codes.view(out, groups, -1).float()
        scales = self.scales.half().float()
        return ((codes - self.zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(out, -1)


def quantize_groups(weight: Tensor, group_size: int) -> GroupCodes:
    """Round [out, in] to the nearest code of the stored grid: the scale is made a float16 first, then codes are taken.

    Rounding against the stored scale, not the float32 one, is what the engine will multiply by.
    Raises ValueError for NaN, Inf and for values too large for a float16 scale.
    """
    codes, zeros, scales = _nearest(weight, group_size)
    return GroupCodes(codes=codes.view(weight.shape).byte(), zeros=zeros.byte(), scales=scales)


def round_groups(weight: Tensor, group_size: int) -> Tensor:
    """`quantize_groups(weight, group_size).dequantize()` at half the cost: what a search does a hundred times."""
    codes, zeros, scales = _nearest(weight, group_size)
    return codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).view(weight.shape)


def _nearest(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, groups, group_size], zero points and scales [out, groups], all float32."""
    groups, low, high = _ranges(weight, group_size)
    scales = _usable((high - low) / LEVELS).half().float()
    zeros = (-low / scales).round_().clamp_(0, LEVELS)
    codes = (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, LEVELS)
    return codes, zeros, scales


def quantize_groups_as_reference(weight: Tensor, group_size: int) -> GroupCodes:
    """LMDeploy v0.1.0's arithmetic: float32 scales, halves away from zero, codes from `w - min`.

    Equal to it bit for bit in groups with values on both sides of 0; where it divides by zero or its zero point
    leaves 0..15 (constant and one-sided groups) the range takes in 0, as in `quantize_groups`.
    """
    groups, low, high = _ranges(weight, group_size)
    scales = _usable((high - low) / LEVELS)
    zeros = _round_half_away(-low / scales).clamp_(0, LEVELS)
    codes = _round_half_away((groups - low.unsqueeze(-1)) / scales.unsqueeze(-1)).clamp_(0, LEVELS)
    return GroupCodes(codes=codes.view(weight.shape).byte(), zeros=zeros.byte(), scales=scales)


def _ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    out, inputs = weight.shape
    groups = weight.float().view(out, inputs // group_size, group_size)
    low, high = groups.aminmax(dim=-1)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the weight has NaN or Inf values, which no 4-bit code can stand for")
    return groups, low.clamp(max=0), high.clamp(min=0)


def _usable(scales: Tensor) -> Tensor:
    """Scales that survive being stored as float16: a group of zeros takes 1, too small ones the smallest float16."""
    if bool((scales > LARGEST_SCALE).any()):
        raise ValueError(
            f"a group spans {scales.max().item() * LEVELS:.3g}: its scale would not fit float16, which 4-bit weights "
            f"are stored with (at most {LARGEST_SCALE:.0f})"
        )
    return torch.where(scales == 0, torch.ones_like(scales), scales.clamp(min=SMALLEST_SCALE))


def _round_half_away(values: Tensor) -> Tensor:
    """Round non-negative values, halves up."""
    return (values + 0.5).floor_()
