# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Drawing tokens from logits in Triton: one program a row, which waits for nothing on the host.

Nothing is sorted. Tokens have a rank, the bits of (max - logit) / temperature: for numbers from 0 on, the larger number
has the larger bits. The rank of the last token that is kept is found by halving, as the smallest one that enough tokens
(top_k) or enough probability (top_p) do not exceed; a row of logits stays in the L2 cache meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.draw_reference import FIELDS, MIN_P, TEMPERATURE, TOP_K, TOP_P, UNIFORM

BLOCK = 4096
_FIELDS, _TEMPERATURE, _TOP_K, _TOP_P = (tl.constexpr(x) for x in (FIELDS, TEMPERATURE, TOP_K, TOP_P))
_MIN_P, _UNIFORM = tl.constexpr(MIN_P), tl.constexpr(UNIFORM)
# The bits of the largest number: infinity, which is no probability, lies beyond.
_LARGEST = tl.constexpr(0x7F7FFFFF)


def draw_tokens(logits: Tensor, numbers: Tensor) -> Tensor:
    """The contract of `draw_reference.draw_tokens`; logits in any float type."""
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _draw[(len(logits),)](logits, numbers, out, logits.stride(0), logits.shape[1], block=BLOCK, num_warps=8)
    return out


@triton.jit
def _draw(logits, numbers, out, stride, vocabulary, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    numbers += row * _FIELDS
    temperature = tl.load(numbers + _TEMPERATURE).to(tl.float32)
    best = float("-inf")
    chosen = 0
    for start in range(0, vocabulary, block):
        token = start + tl.arange(0, block)
        x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
        highest = tl.max(x, axis=0)
        if highest > best:
            best = highest
            chosen = tl.min(tl.where(x == highest, token, vocabulary), axis=0)
    if temperature > 0:
        temperature = tl.maximum(temperature, 1.1754943508222875e-38)
        limit = tl.full([], _LARGEST, tl.int32)
        top_k = tl.load(numbers + _TOP_K)
        if top_k > 0:
            low = tl.full([], 0, tl.int32)
            while low < limit:
                middle = low + (limit - low) // 2
                count, _ = _below(logits, vocabulary, best, temperature, middle, block)
                if count >= top_k:
                    limit = middle
                else:
                    low = middle + 1
        top_p = tl.load(numbers + _TOP_P)
        if top_p < 1:
            _, mass = _below(logits, vocabulary, best, temperature, limit, block)
            share = top_p * mass
            low = tl.full([], 0, tl.int32)
            while low < limit:
                middle = low + (limit - low) // 2
                _, mass = _below(logits, vocabulary, best, temperature, middle, block)
                if mass >= share:
                    limit = middle
                else:
                    low = middle + 1
        min_p = tl.load(numbers + _MIN_P).to(tl.float32)
        total = tl.full([], 0.0, tl.float64)
        for start in range(0, vocabulary, block):
            p = _kept(logits, start, vocabulary, best, temperature, limit, min_p, block)
            total += tl.sum(p, axis=0)
        aim = tl.load(numbers + _UNIFORM) * total
        before = tl.full([], 0.0, tl.float64)
        chosen = vocabulary
        last = vocabulary - 1
        for start in range(0, vocabulary, block):
            if chosen == vocabulary:
                token = start + tl.arange(0, block)
                p = _kept(logits, start, vocabulary, best, temperature, limit, min_p, block)
                found = (before + tl.cumsum(p, axis=0) > aim) & (p > 0)
                chosen = tl.min(tl.where(found, token, vocabulary), axis=0)
                # Where rounding leaves the aim beyond the last sum, it is the last token that is kept.
                kept = tl.max(tl.where(p > 0, token, -1), axis=0)
                last = tl.where(kept >= 0, kept, last)
                before += tl.sum(p, axis=0)
        chosen = tl.where(chosen == vocabulary, last, chosen)
    tl.store(out + row, chosen)


@triton.jit
def _distances(logits, start, vocabulary, best, temperature, block: tl.constexpr):
    """(max - logit) / temperature of a block of tokens, and its bits."""
    token = start + tl.arange(0, block)
    x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    distance = tl.abs((best - x) / temperature)
    return distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def _below(logits, vocabulary, best, temperature, limit, block: tl.constexpr):
    """How many tokens do not exceed a rank, and their probabilities, of which the likeliest token's is 1."""
    count = tl.full([], 0, tl.int32)
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, vocabulary, block):
        distance, rank = _distances(logits, start, vocabulary, best, temperature, block)
        count += tl.sum(tl.where(rank <= limit, 1, 0), axis=0)
        mass += tl.sum(tl.where(rank <= limit, tl.exp(-distance), 0.0).to(tl.float64), axis=0)
    return count, mass


@triton.jit
def _kept(logits, start, vocabulary, best, temperature, limit, min_p, block: tl.constexpr):
    """Probabilities of a block of tokens, 0 where they are dropped."""
    distance, rank = _distances(logits, start, vocabulary, best, temperature, block)
    p = tl.exp(-distance)
    return tl.where((rank <= limit) & (p >= min_p), p, 0.0).to(tl.float64)
