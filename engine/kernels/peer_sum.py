# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
"""Sums and maxima over GPUs that reach each other's memory, in one kernel each, and sums with the norm of the residual
stream behind them in the same one.

Every rank stores its values into an inbox in the memory of each other rank, and adds up what arrives in its own, in the
order of ranks, so that all have the same bits. Four bytes of values travel with the number of the exchange beside them
in one word of eight, which is stored whole: a word with the right number has arrived, and nothing else is waited for
(the low-latency protocol of NCCL). A program exchanges the same place of the inboxes each time, and every second time
in the same half of them: who has heard exchange n of a rank knows that it has read exchange n - 1. Programs that norm a
row have places of their own, behind the others', each with room for the longest row, so rows may differ from call to
call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts
from engine.kernels.norm import float_warps, normed_row

# Words of four bytes that a program exchanges, and that an inbox has room for of each rank: 256 rows of 4096 halves.
BLOCK = tl.constexpr(512)
MOST_WORDS = 1 << 19
# Rows that are normed in the same kernel, and words of one.
MOST_ROWS, ROW_WORDS = 256, 4096
# Programs of both kinds, each with a number of its own for the exchange that it is at.
COUNTS = MOST_WORDS // BLOCK.value + MOST_ROWS
HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def inbox_words(size: int) -> int:
    """int64 numbers of an inbox among `size` ranks: for each kind of programs two halves, with room for each rank."""
    return 2 * size * (MOST_WORDS + MOST_ROWS * ROW_WORDS)


@dataclass(frozen=True, slots=True)
class Peers:
    """What one of `size` ranks exchanges through. All make the same exchanges in the same order, on one stream.

    `addresses` int64 [size] are those of the ranks' inboxes as this rank reaches them: of `inbox_words` zeros at first.
    `counts` int32 [COUNTS] are zeros at first. Once `stop` int32 [1] is not zero no exchange waits, and
    results mean nothing. `holds` is what must live as long.
    """

    rank: int
    size: int
    addresses: Tensor
    counts: Tensor
    stop: Tensor
    holds: tuple[Any, ...] = ()

    def carry(self, x: Tensor) -> bool:
        """Whether `sum` (of float16 and bfloat16) or `max` (of float32) takes x: so little that its latency counts."""
        words, rest = divmod(x.numel() * x.element_size(), 4)
        kind = x.dtype in HALVES or x.dtype == torch.float32
        return kind and rest == 0 and 0 < words <= MOST_WORDS // (self.size - 1) and x.is_contiguous()

    def carry_rows(self, x: Tensor) -> bool:
        """Whether `add_rms_norm` takes x [T, hidden]."""
        rows, width = x.shape
        return x.dtype in HALVES and rows <= MOST_ROWS and width % 2 == 0 and width <= 2 * ROW_WORDS and self.carry(x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in x: in float32 in the order of ranks, rounded once."""
        self._exchange(x)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of every rank's x, value by value, in x; NaN where one is."""
        self._exchange(x)
        return x

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`reference.add_rms_norm` of the sum of every rank's x, to the bit what `sum` and `norm.add_rms_norm` give one
        after the other; x stays."""
        rows, width = x.shape
        out, total = torch.empty_like(x), torch.empty_like(residual)
        padded = triton.next_power_of_2(width)
        _exchange_and_norm[(rows,)](
            x.view(torch.int32),
            residual,
            weight,
            total,
            out,
            self.addresses,
            self.counts,
            self.stop,
            eps,
            WIDTH=width,
            PADDED=padded,
            RANK=self.rank,
            SIZE=self.size,
            BEHIND=MOST_WORDS,
            COUNTS_BEHIND=MOST_WORDS // BLOCK.value,
            MOST=MOST_ROWS * ROW_WORDS,
            ROW=ROW_WORDS,
            num_warps=float_warps(padded),
            **options(facts(x.device)),
        )
        return out, total

    def _exchange(self, x: Tensor) -> None:
        words = x.view(-1).view(torch.int32)
        _exchange[(triton.cdiv(len(words), BLOCK.value),)](
            words,
            self.addresses,
            self.counts,
            self.stop,
            len(words),
            RANK=self.rank,
            SIZE=self.size,
            MOST=MOST_WORDS,
            HALF=HALVES.get(x.dtype),
            MAXIMA=x.dtype == torch.float32,
            num_warps=4,
            **options(facts(x.device)),
        )


@triton.jit
def _exchange(
    x,
    addresses,
    counts,
    stop,
    words,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    HALF: tl.constexpr,
    MAXIMA: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < words
    if PDL:
        depend()
    number = tl.load(counts + block) + 1
    own = tl.load(x + place, mask=inside, other=0)
    low, high = _joined(own, place, inside, number, addresses, stop, 0, RANK, SIZE, MOST, HALF, MAXIMA)
    if MAXIMA:
        word = low.to(tl.int32, bitcast=True)
    else:
        word = high.to(HALF).to(tl.int16, bitcast=True).to(tl.int32) << 16
        word = word | (low.to(HALF).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    tl.store(x + place, word, mask=inside)
    tl.store(counts + block, number)


@triton.jit
def _exchange_and_norm(
    x,
    residual,
    weight,
    total,
    out,
    addresses,
    counts,
    stop,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BEHIND: tl.constexpr,
    COUNTS_BEHIND: tl.constexpr,
    MOST: tl.constexpr,
    ROW: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    WORDS: tl.constexpr = WIDTH // 2
    HALF: tl.constexpr = total.dtype.element_ty
    word = tl.arange(0, PADDED // 2)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        depend()
    number = tl.load(counts + COUNTS_BEHIND + row) + 1
    own = tl.load(x + row * WORDS + word, mask=word < WORDS, other=0)
    before = tl.load(residual + row * WIDTH + column, mask=inside, other=0.0)
    behind = 2 * SIZE * BEHIND
    place = row * ROW + word
    low, high = _joined(own, place, word < WORDS, number, addresses, stop, behind, RANK, SIZE, MOST, HALF, False)
    tl.store(counts + COUNTS_BEHIND + row, number)
    # Pairs side by side are the row in its order, in the threads where they are.
    value = tl.join(low.to(HALF), high.to(HALF)).reshape(PADDED)
    value = (value.to(tl.float32) + before.to(tl.float32)).to(HALF)
    tl.store(total + row * WIDTH + column, value, mask=inside)
    normed = normed_row(value, factor, eps, WIDTH)
    tl.store(out + row * WIDTH + column, normed.to(HALF), mask=inside)


@triton.jit
def _joined(
    own,
    place,
    inside,
    number,
    addresses,
    stop,
    behind,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    HALF: tl.constexpr,
    MAXIMA: tl.constexpr,
):
    """The sums in float32 of all ranks' words, of their low and of their high halves; or the maxima of whole words.
    `place` is theirs among MOST of a rank, in the part of the inboxes that begins at `behind`."""
    tag = number.to(tl.int64) << 32
    sent = tag | (own.to(tl.int64) & 0xFFFFFFFF)
    half = behind + (number & 1).to(tl.int64) * (SIZE * MOST)
    for step in tl.static_range(1, SIZE):
        there = tl.multiple_of(tl.load(addresses + (RANK + step) % SIZE).to(tl.pointer_type(tl.int64)), 16)
        tl.store(there + half + RANK * MOST + place, sent, mask=inside)
    here = tl.multiple_of(tl.load(addresses + RANK).to(tl.pointer_type(tl.int64)), 16) + half + place
    low = (own * 0).to(tl.float32)
    high = low
    if MAXIMA:
        low = low - float("inf")
    for rank in tl.static_range(SIZE):
        said = own
        if rank != RANK:
            arrived = tl.load(here + rank * MOST, mask=inside, other=tag, volatile=True)
            missing = tl.max(((arrived >> 32).to(tl.int32) != number).to(tl.int32), axis=0)
            while missing > 0:
                arrived = tl.load(here + rank * MOST, mask=inside, other=tag, volatile=True)
                missing = tl.max(((arrived >> 32).to(tl.int32) != number).to(tl.int32), axis=0)
                missing = missing & (tl.load(stop, volatile=True) == 0).to(tl.int32)
            said = arrived.to(tl.int32)
        if MAXIMA:
            low = tl.maximum(low, said.to(tl.float32, bitcast=True), propagate_nan=tl.PropagateNan.ALL)
        else:
            low += (said & 0xFFFF).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
            high += (said >> 16).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
    return low, high
