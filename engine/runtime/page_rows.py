"""The page table of a step as numbers, kept from one step to the next: most sequences have the pages that they had."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from engine.runtime.sequence import Sequence


class PageRows:
    """A row is written anew where its sequence has another list of pages than the one that was written, or more pages:
    the scheduler lets a list grow and puts a new one in its place, and changes none otherwise. `version` is another
    number, above 0, where the table is not the one of the call before."""

    def __init__(self, rows: int, width: int) -> None:
        """For at most `rows` sequences of at most `width` pages."""
        self._table = np.zeros((rows, width), dtype=np.int32)
        self._lists: list[list[int]] = []  # what was written, held so that `is` tells one from another
        self._lengths: list[int] = []
        self.version = 0

    def of(self, sequences: Items[Sequence]) -> NDArray[np.int32]:
        """int32 [B, P], 0 behind a sequence's pages; to be read before the next call."""
        lists = [sequence.pages for sequence in sequences]
        lengths = [len(pages) for pages in lists]
        if lengths != self._lengths or lists != self._lists:
            before = list(zip(self._lists, self._lengths, strict=True))
            for row, (pages, length) in enumerate(zip(lists, lengths, strict=True)):
                if row >= len(before) or pages is not before[row][0] or length != before[row][1]:
                    self._table[row, :length] = pages
                    self._table[row, length:] = 0
            self._lists, self._lengths = lists, lengths
            self.version += 1
        return self._table[: len(lists), : max(lengths, default=0)]
