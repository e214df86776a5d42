# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What every step begins with, as one Triton kernel: tokens that were drawn in the step before, their rows of the
embedding, and the angles of their positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts

BLOCK = 2048


def begin_step(
    token_ids: Tensor, drawn: Tensor | None, embedding: Tensor, positions: Tensor, frequencies: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `reference.begin_step`."""
    tokens, hidden = len(token_ids), embedding.shape[1]
    half, device = frequencies.shape[-1], embedding.device
    rows = torch.empty(tokens, hidden, dtype=embedding.dtype, device=device)
    cos, sin = (torch.empty(tokens, half, dtype=torch.float32, device=device) for _ in range(2))
    if tokens:
        _begin_step[(tokens, triton.cdiv(hidden, BLOCK))](
            token_ids,
            token_ids if drawn is None else drawn,
            embedding,
            positions,
            frequencies,
            rows,
            cos,
            sin,
            factor,
            embedding.stride(0),
            frequencies.stride(0) if frequencies.dim() > 1 else 0,
            draws=drawn is not None,
            hidden=hidden,
            half=half,
            padded=triton.next_power_of_2(half),
            block=BLOCK,
            num_warps=4,
            **options(facts(device)),
        )
    return rows, cos, sin


@triton.jit
def _begin_step(
    token_ids,
    drawn,
    embedding,
    positions,
    frequencies,
    rows,
    cos,
    sin,
    factor,
    stride,
    frequency_stride,
    draws: tl.constexpr,
    hidden: tl.constexpr,
    half: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    PDL: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        depend()
    token = tl.load(token_ids + row).to(tl.int64)
    if draws:
        token = tl.where(token < 0, tl.load(drawn + tl.maximum(-1 - token, 0)), token)
    column = part * block + tl.arange(0, block)
    values = tl.load(embedding + token * stride + column, mask=column < hidden, other=0.0)
    tl.store(rows + row * hidden + column, values, mask=column < hidden)
    if part == 0:
        pair = tl.arange(0, padded)
        inside = pair < half
        frequencies += row * frequency_stride
        angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + pair, mask=inside, other=0.0)
        tl.store(cos + row * half + pair, tl.cos(angle) * factor, mask=inside)
        tl.store(sin + row * half + pair, tl.sin(angle) * factor, mask=inside)
