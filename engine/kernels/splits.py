# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Products whose sum over inputs is split among programs: partial sums meet in memory and are added in a fixed order.

Every program of a tile stores its part and counts itself in; the last to arrive adds the parts from first to last and
sets the count back. The order of the sum does not depend on who was last, so the same inputs give the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# What the parts of one launch may take; a launch that would need more is split less.
PARTIAL_FLOATS = 1 << 24
TILES = 1 << 16
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


@functools.cache
def buffers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums (float32) and counts of arrivals (int32, 0 between launches) of a device.

    They are shared by all launches: launches of one device must follow one another, in one stream or in graphs that do
    not overlap. Made at the first call, which must not be one that a graph captures.
    """
    return (
        torch.empty(PARTIAL_FLOATS, dtype=torch.float32, device=device),
        torch.zeros(TILES, dtype=torch.int32, device=device),
    )


def fitting(splits: int, tiles: int, tile_floats: int, steps: int) -> int:
    """At most `splits`: no more than there are steps to share out, or than the buffers have room for."""
    if tiles > TILES:
        return 1
    return max(1, min(splits, steps, PARTIAL_FLOATS // (tiles * tile_floats)))


def near(tiles: int, multiprocessors: int, shares: Sequence[int]) -> list[int]:
    """Splits (of a few sizes, each of which is compiled once) that give about `shares` programs a multiprocessor."""
    wanted = [share * multiprocessors / tiles for share in shares]
    return sorted({min(SIZES, key=lambda size: abs(math.log(size / share))) for share in wanted})


@triton.jit
def combine(part, partials, arrivals, tile, split, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(sum of all parts [ROWS, COLUMNS], true) in the last program of a tile to arrive, else (its part, false)."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = partials + tile.to(tl.int64) * (SPLITS * ROWS * COLUMNS)
    tl.store(first + split * (ROWS * COLUMNS) + offsets, part)
    tl.debug_barrier()  # every thread's part is written before one thread counts the program in
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1
    total = part
    if last:
        total = tl.load(first + offsets, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            total += tl.load(first + other * (ROWS * COLUMNS) + offsets, cache_modifier=".cg")
        tl.store(arrivals + tile, 0)
    return total, last
