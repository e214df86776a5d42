"""Steps in which every sequence computes one token and draws the next, padded to a batch size that has a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count, takewhile

import numpy as np
import torch
from torch import Tensor

from engine.models.batch import Batch
from engine.runtime.batch import Size, Step, aligned, bases_of
from engine.runtime.page_rows import PageRows
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import PENDING, Sequence
from engine.runtime.staging import Staging

# Rows of the header.
FIELDS = 5
IDS, POSITIONS, LENGTHS, IGNORES, SLOTS = range(FIELDS)
# Contexts of one length lose by parts and those whose longest is 4.3 times the middle one gain (docs/log.md); where
# between them parts begin to pay has not been measured.
LONGER = 1.25


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 64, then steps of 32 up to 256 and of 64 beyond; the last one is `most`. Steps are small
    where a padded row costs, and few, since every graph costs start time."""
    sizes = [*(1 << power for power in range(7)), *range(96, 257, 32)]
    sizes += takewhile(lambda size: size < most, count(320, 64))
    return [*(size for size in sizes if size < most), most]


def room_for(size: Size) -> int:
    """Integers in the header of a step."""
    return FIELDS * aligned(size.tokens)


def are_uneven(sequences: tuple[Sequence, ...]) -> bool:
    """Whether the first of `sequences`, which are in the order of their contexts, longest first, is far longer than the
    one in the middle."""
    return bool(sequences) and sequences[0].cached > LONGER * sequences[len(sequences) // 2].cached


class DecodeSteps:
    """Padded rows have no context and write to the spare slot."""

    def __init__(self, staging: Staging, sizes: list[int], *, uneven: Collection[int], deterministic: bool) -> None:
        """Of the batch sizes `uneven` ones have a second graph. With `deterministic`, batches are `invariant`: each
        token is taken for a block of a prompt."""
        self.sizes = [*map(Size, sizes), *(Size(size, uneven=True) for size in uneven)]
        self._counts, self._uneven = sizes, frozenset(uneven)
        self._staging = staging
        self._deterministic = deterministic
        most, device = max(sizes), staging.header.device
        self._page_rows = PageRows(*staging.page_table.shape)
        self._numbers = np.arange(most)
        self._rows = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._blocks = torch.stack([self._rows, torch.zeros_like(self._rows)], dim=1)

    def size_for(self, plan: Plan) -> Size | None:
        """The graph that computes a plan; None where none does."""
        sequences = plan.sequences
        # Those with more than one token are the last.
        if len(plan.drawing) < len(sequences) or (sequences and sequences[-1].scheduled > 1):
            return None
        size = next((size for size in self._counts if size >= len(sequences)), None)
        return None if size is None else Size(size, uneven=size in self._uneven and are_uneven(sequences))

    def step_of(self, plan: Plan, rows: Mapping[Sequence, int], number: int, size: Size) -> Step:
        """A plan as the graph of `size` reads it. `rows` is that of `build_batch`, `number` that of this step."""
        sequences = plan.sequences
        pages = self._page_rows.of(sequences)
        here, width = pages.shape
        lies_there = self._page_rows.version == self._staging.table
        lengths = [room_for(size), 0 if lies_there else pages.size]
        flat, table = self._staging.host(number, lengths)
        if not lies_there:
            table.reshape(here, width)[:] = pages
        header = flat.reshape(FIELDS, -1)
        # `token_ids` written out: this is done for every token.
        last = [sequence.tokens[-1] for sequence in sequences]
        header[IDS, :here] = [
            -(rows[one] + 1) if token == PENDING else token for one, token in zip(sequences, last, strict=True)
        ]
        cached = np.array([sequence.cached for sequence in sequences], dtype=np.int32)
        header[POSITIONS, :here] = cached
        header[LENGTHS, :here] = cached + 1
        header[IGNORES, :here] = [sequence.sampling.ignore_eos for sequence in sequences]
        page, place = np.divmod(cached, self._staging.page_len)
        header[SLOTS, :here] = pages[self._numbers[:here], page] * self._staging.page_len + place
        header[:SLOTS, here:] = 0
        header[SLOTS, here:] = self._staging.spare_slot
        return Step(
            integers=self._staging.integers(number, lengths),
            lengths=lengths,
            draws=here,
            width=width,
            decodes=here,
            bases=bases_of(plan),
            graph=size,
            table=self._page_rows.version,
        )

    def batch(self, size: Size) -> Batch:
        """What the graph of `size` computes, wherever it was sent to."""
        header, staging, here = self._header(size), self._staging, size.tokens
        return Batch(
            token_ids=header[IDS],
            drawn=staging.drawn,
            positions=header[POSITIONS],
            query_starts=self._rows[: here + 1],
            context_lens=header[LENGTHS],
            page_table=staging.page_table[:here],
            slots=header[SLOTS],
            logits_at=self._rows[:here],
            rope_bases=None if staging.rope_bases is None else staging.rope_bases[:here],
            decodes=0 if self._deterministic else here,
            blocks=self._blocks[: here if self._deterministic else 0],
            uneven=size.uneven,
            invariant=self._deterministic,
        )

    def ignoring(self, size: Size) -> Tensor:
        """Which rows ignore end tokens: int32 [B]."""
        return self._header(size)[IGNORES]

    def _header(self, size: Size) -> Tensor:
        return self._staging.header[: room_for(size)].view(FIELDS, -1)[:, : size.tokens]
