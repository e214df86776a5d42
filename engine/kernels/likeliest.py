# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""The likeliest token of each row of logits, in Triton: one kernel for end tokens that are ignored, a copy of the
logits and the search, which several programs share of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts
from engine.kernels.splits import buffers

# Logits of a program: few enough that one row occupies a dozen multiprocessors.
BLOCK, PART = 2048, 8192


def likeliest(logits: Tensor, ignoring: Tensor, eos_token_ids: Tensor, out: Tensor, copy: Tensor | None = None) -> None:
    """The contract of `reference.likeliest`. A row of nothing but NaN has token 0."""
    rows, vocabulary = logits.shape
    if not rows:
        return
    parts = triton.cdiv(vocabulary, PART)
    _likeliest[(parts, rows)](
        logits,
        ignoring,
        eos_token_ids,
        out,
        out if copy is None else copy,
        torch.empty(rows, parts, dtype=torch.float32, device=logits.device),
        torch.empty(rows, parts, dtype=torch.int32, device=logits.device),
        buffers(logits.device)[1],
        logits.stride(0),
        0 if copy is None else copy.stride(0),
        vocabulary,
        ends=len(eos_token_ids),
        copies=copy is not None,
        parts=parts,
        padded=triton.next_power_of_2(parts),
        part=PART,
        block=BLOCK,
        num_warps=8,
        **options(facts(logits.device)),
    )


@triton.jit
def _likeliest(
    logits,
    ignoring,
    eos_token_ids,
    out,
    copy,
    values,
    places,
    arrivals,
    stride,
    copy_stride,
    vocabulary,
    ends: tl.constexpr,
    copies: tl.constexpr,
    parts: tl.constexpr,
    padded: tl.constexpr,
    part: tl.constexpr,
    block: tl.constexpr,
    PDL: tl.constexpr,
):
    number, row = tl.program_id(0), tl.program_id(1)
    here = logits + row.to(tl.int64) * stride
    there = copy + row.to(tl.int64) * copy_stride
    if PDL:
        depend()
    ignores = tl.load(ignoring + row) != 0
    best = float("-inf")
    found = vocabulary
    for start in range(number * part, tl.minimum((number + 1) * part, vocabulary), block):
        token = start + tl.arange(0, block)
        inside = token < vocabulary
        x = tl.load(here + token, mask=inside, other=float("-inf"))
        if copies:
            tl.store(there + token, x, mask=inside)
        x = x.to(tl.float32)
        for end in tl.static_range(ends):
            x = tl.where(ignores & (token == tl.load(eos_token_ids + end)), float("-inf"), x)
        highest = tl.max(x, axis=0)
        if highest > best:
            best = highest
            found = tl.min(tl.where(x == highest, token, vocabulary), axis=0)
    tl.store(values + row * parts + number, best)
    tl.store(places + row * parts + number, found)
    tl.debug_barrier()  # both are written before one thread counts the program in
    last = tl.atomic_add(arrivals + row, 1, sem="acq_rel") == parts - 1
    if last:
        other = tl.arange(0, padded)
        inside = other < parts
        value = tl.load(values + row * parts + other, mask=inside, other=float("-inf"), cache_modifier=".cg")
        place = tl.load(places + row * parts + other, mask=inside, other=vocabulary, cache_modifier=".cg")
        token = tl.min(tl.where(value == tl.max(value, axis=0), place, vocabulary), axis=0)
        tl.store(out + row, tl.where(token < vocabulary, token, 0).to(tl.int64))
        tl.store(arrivals + row, 0)
