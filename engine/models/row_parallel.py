"""Linears that are cut along their inputs: every rank multiplies its own, and the products are added up over all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels import cpu_linear, ops, reference
from engine.kernels.rotation import rotate
from engine.models.linear import Int8Linear, Int8Rows, Kind, Linear, settled
from engine.models.ranks import Part, Ranks


class RowParallel:
    """A linear of floats or of 4-bit groups. Its bias, if any, is with one rank alone."""

    def __init__(self, linear: Linear, ranks: Ranks) -> None:
        self._linear, self._ranks = linear, ranks

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x).whole()

    def part(self, x: Tensor) -> Part:
        """`forward`, its sum left to what reads it."""
        return Part(self._linear.forward(x), self._ranks)


class Int8RowParallel:
    """An int8 linear, with its bias on every rank. A row has one scale over all ranks, so the int8 inputs are those of
    one rank alone. Without kernels the whole sums are exact too, and so is the result."""

    def __init__(self, linear: Int8Linear, ranks: Ranks) -> None:
        self._linear, self._ranks = linear, ranks

    def rows(self, x: Tensor, *, gated: bool = False) -> Int8Rows:
        """x [T, in of this rank], or silu(gate) * up of it where it is `gated`, by the largest magnitudes of whole
        rows."""
        rotated = self._linear.rotated
        if gated:
            maxima = self._ranks.max(ops.row_maxima(x, gated=True, rotated=rotated))
            return Int8Rows(*ops.silu_and_mul_int8(x, maxima, rotated), x.dtype)
        x = rotate(x, rotated).to(x.dtype)
        return Int8Rows(*ops.quantize_rows(x, self._ranks.max(ops.row_maxima(x, gated=False))), x.dtype)

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        rows = x if isinstance(x, Int8Rows) else self.rows(x)
        values, scales = rows.values.reshape(-1, rows.values.shape[-1]), rows.scales.reshape(-1)
        weight, weight_scales, bias = self._linear.weight, self._linear.scales, self._linear.bias
        if ops.on_kernels(values) and rows.dtype in ops.HALVES:
            # One kernel multiplies and scales: what is added up is in the computing type.
            bias = bias if self._ranks.rank == 0 else None
            out = self._ranks.sum(ops.int8_linear(values, scales, weight, weight_scales, bias, rows.dtype))
        else:
            exact = cpu_linear if cpu_linear.multiplies_int8(values, weight) else reference
            products = self._ranks.sum(exact.int8_products(values, weight))
            out = reference.scale_products(products, scales, weight_scales, bias, rows.dtype)
        return out.view(*rows.values.shape[:-1], len(weight))


def unsummed(linear: Linear, x: Any) -> Tensor | Part:
    """What `linear` makes of x, a sum over ranks left to what reads it where it can be."""
    return linear.part(x) if isinstance(linear, RowParallel) else linear.forward(x)


def row_parallel(linear: Kind, ranks: Ranks | None, dtype: torch.dtype, *, tile: int = 0) -> Linear:
    """A `settled` linear, its inputs cut over `ranks` where there are several."""
    if ranks is None:
        return settled(linear, dtype, tile=tile)
    if isinstance(linear, Int8Linear):
        return Int8RowParallel(linear, ranks)  # its sums are exact whatever the shape
    return RowParallel(settled(linear, dtype, tile=tile), ranks)
