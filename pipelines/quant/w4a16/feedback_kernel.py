# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""`feedback.round_block` on a GPU: columns one after the other in registers, rows of the weight side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # rows of the weight in a program
LIMIT = tl.constexpr(64.0)  # codes beyond it are clamped whatever the zero point is
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away it rounds halves to even


def round_block(block: Tensor, corner: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of `pipelines.quant.w4a16.feedback.round_block`, for tensors on a GPU; `block` is left as it is."""
    group, out = block.shape
    codes = torch.empty(group, out, dtype=torch.uint8, device=block.device)
    errors = torch.empty_like(block)
    _round_block[(triton.cdiv(out, ROWS),)](
        block.contiguous(),
        corner,
        scales.contiguous(),
        zeros.contiguous(),
        codes,
        errors,
        out,
        group,
        padded=triton.next_power_of_2(group),
        rows=ROWS,
    )
    return codes, errors


@triton.jit
def _round_block(
    block,
    corner,
    scales,
    zeros,
    codes,
    errors,
    out,
    group: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, padded)
    here = row < out
    inside = (column < group)[:, None] & here[None, :]
    values = tl.load(block + column[:, None] * out + row[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + row, mask=here, other=1.0)
    zero = tl.load(zeros + row, mask=here, other=0.0)
    for j in range(group):
        value = tl.sum(tl.where(column[:, None] == j, values, 0.0), axis=0)
        step = tl.minimum(tl.maximum(value / scale, -LIMIT), LIMIT)
        code = tl.minimum(tl.maximum((step + ROUNDER) - ROUNDER + zero, 0.0), 15.0)
        factors = tl.load(corner + j * group + column, mask=column < group, other=0.0)
        diagonal = tl.load(corner + j * group + j)
        error = (value - (code - zero) * scale) / diagonal
        tl.store(codes + j * out + row, code.to(tl.uint8), mask=here)
        tl.store(errors + j * out + row, error, mask=here)
        values -= tl.where(column > j, factors, 0.0)[:, None] * error[None, :]
