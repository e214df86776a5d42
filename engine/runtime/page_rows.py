"""The page table of a step as numbers, kept from one step to the next: most sequences have the pages that they had."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from engine.runtime.sequence import Sequence


class PageRows:
    """A row is written anew where its sequence has another list of pages than the one that was written, or more pages:
    the scheduler lets a list grow and puts a new one in its place, and changes none otherwise. `version` is another
    number, from 1 on, where the table is not the one of the call before."""

    def __init__(self, rows: int, width: int) -> None:
        """For at most `rows` sequences of at most `width` pages."""
        self._table = np.zeros((rows, width), dtype=np.int32)
        self._lists: list[list[int]] = [[] for _ in range(rows)]  # held, so that `is` tells one from another
        self._lengths = [0] * rows
        self._shape = (-1, -1)
        self.version = 0

    def of(self, sequences: Items[Sequence]) -> NDArray[np.int32]:
        """int32 [B, P], 0 behind a sequence's pages; to be read before the next call."""
        changed = False
        for row, (sequence, written) in enumerate(zip(sequences, self._lists, strict=False)):
            pages = sequence.pages
            if pages is not written or len(pages) != self._lengths[row]:
                self._table[row, : len(pages)] = pages
                self._table[row, len(pages) :] = 0
                self._lists[row], self._lengths[row] = pages, len(pages)
                changed = True
        shape = len(sequences), max(self._lengths[: len(sequences)], default=0)
        if changed or shape != self._shape:
            self._shape = shape
            self.version += 1
        return self._table[: shape[0], : shape[1]]
