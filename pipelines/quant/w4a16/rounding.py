"""Group quantization: a weight becomes 4-bit codes with one scale and one zero point per row and group of inputs.

The value of a code is `(code - zero) * scale`. The range of a group always takes in 0, so the zero point lies
in 0..15 whatever the signs of the group are, and a group of equal values is exact. Symmetric groups have zero point 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15
MIDDLE = 8  # the zero point of every symmetric group
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16: what scales are stored in
LARGEST_SCALE = 65504.0  # the largest float16
# Parts of a group's range that are tried where ranges are searched, the whole first.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


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

    def divided(self, divisor: Tensor) -> GroupCodes:
        """Row j divided by divisor[j]: the same codes, other scales. Exact but for the float16 that scales are."""
        scales = (self.scales / divisor.unsqueeze(-1)).half().float()
        return GroupCodes(codes=self.codes, zeros=self.zeros, scales=scales.clamp(SMALLEST_SCALE, LARGEST_SCALE))

    def rows(self, counts: list[int]) -> list[GroupCodes]:
        """The codes of matrices that were stacked, `counts` rows of each."""
        codes, zeros, scales = (torch.split(part, counts) for part in (self.codes, self.zeros, self.scales))
        return [GroupCodes(codes=c, zeros=z, scales=s) for c, z, s in zip(codes, zeros, scales, strict=True)]


def quantize_groups(
    weight: Tensor, group_size: int, *, symmetric: bool = False, gram: Tensor | None = None
) -> GroupCodes:
    """Round [out, in] to the nearest code of the stored grid: the scale is made a float16 first, then codes are taken.

    Rounding against the stored scale, not the float32 one, is what the engine will multiply by. With `gram` [in, in],
    that of the inputs, ranges are searched (`searched_levels`).
    Raises ValueError for NaN, Inf and for values too large for a float16 scale.
    """
    codes, zeros, scales = _nearest(weight, group_size, symmetric, gram)
    return GroupCodes(codes=codes.view(weight.shape).byte(), zeros=zeros.byte(), scales=scales)


def round_groups(weight: Tensor, group_size: int, *, symmetric: bool = False, gram: Tensor | None = None) -> Tensor:
    """`quantize_groups(weight, ...).dequantize()` at half the cost: what a search does a hundred times."""
    codes, zeros, scales = _nearest(weight, group_size, symmetric, gram)
    return codes.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).view(weight.shape)


def levels(groups: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups [..., group]: each float32 [...], the scale a float16's value."""
    low, high = _ends(groups)
    return _grid(low, high, symmetric)


def searched_levels(groups: Tensor, metric: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """The levels whose rounding leaves the least error d M d^T, among the whole range and parts of it (SHRINKS).

    `groups` is [..., rows, group] and `metric` M [..., group, group]. A group that gains nothing keeps its range
    (Lin et al. 2023, section 3.2, clip the same way; their measure is a sample of outputs).
    """
    low, high = _ends(groups)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for part in SHRINKS:
        scales, zeros = _grid(low * part, high * part, symmetric)
        difference = _codes(groups, scales, zeros).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).sub_(groups)
        error = ((difference @ metric) * difference).sum(dim=-1)
        if best is None:
            best = error, scales, zeros
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better, scales, best[1]),
            torch.where(better, zeros, best[2]),
        )
    assert best is not None
    return best[1], best[2]


def quantize_groups_as_reference(weight: Tensor, group_size: int) -> GroupCodes:
    """LMDeploy v0.1.0's arithmetic: float32 scales, halves away from zero, codes from `w - min`.

    Equal to it bit for bit in groups with values on both sides of 0; where it divides by zero or its zero point
    leaves 0..15 (constant and one-sided groups) the range takes in 0, as in `quantize_groups`.
    """
    groups = weight.float().view(weight.shape[0], -1, group_size)
    low, high = _ends(groups)
    scales = _usable((high - low) / LEVELS)
    zeros = _round_half_away(-low / scales).clamp_(0, LEVELS)
    codes = _round_half_away((groups - low.unsqueeze(-1)) / scales.unsqueeze(-1)).clamp_(0, LEVELS)
    return GroupCodes(codes=codes.view(weight.shape).byte(), zeros=zeros.byte(), scales=scales)


def _nearest(weight: Tensor, group_size: int, symmetric: bool, gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, groups, group_size], zero points and scales [out, groups], all float32."""
    groups = weight.float().view(weight.shape[0], -1, group_size)
    if gram is None:
        scales, zeros = levels(groups, symmetric=symmetric)
    else:
        count = groups.shape[1]
        blocks = gram.view(count, group_size, count, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        found = searched_levels(groups.transpose(0, 1), blocks.contiguous(), symmetric=symmetric)
        scales, zeros = (part.t().contiguous() for part in found)
    return _codes(groups, scales, zeros), zeros, scales


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, LEVELS)


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = groups.aminmax(dim=-1)
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the weight has NaN or Inf values, which no 4-bit code can stand for")
    return low.clamp(max=0), high.clamp(min=0)


def _grid(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        scales = _usable(2 * torch.maximum(-low, high) / LEVELS).half().float()
        return scales, torch.full_like(scales, MIDDLE)
    scales = _usable((high - low) / LEVELS).half().float()
    return scales, (-low / scales).round_().clamp_(0, LEVELS)


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
