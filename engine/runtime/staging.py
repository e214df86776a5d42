"""Where the integers of a step go that a graph reads: memory at fixed places, filled by one copy from the host."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.cache import KVCache
from engine.models.decoder import Decoder
from engine.models.rope_scaling import is_dynamic
from engine.runtime.batch import Step


class Staging:
    """What all graphs read, since no two run at once. The cache must have a page more than are given out, its last.

    header       int32 [room]     every size of graph has a layout of its own there
    page_table   int32 [B, P]     of the most sequences, and of two more that stand for none
    rope_bases   float64 [B]      where the model's base depends on the length, else None
    drawn        int64 [n]        tokens of the step before; a graph leaves its own there
    spare_slot                    where what is padded writes K and V
    """

    def __init__(
        self, model: Decoder, cache: KVCache, drawn: Tensor, *, room: int, max_batch_size: int, session_len: int
    ) -> None:
        device, rows = model.device, max_batch_size + 2
        width = -(-session_len // cache.page_len)
        self.page_len = cache.page_len
        self.spare_slot = (cache.num_pages - 1) * cache.page_len
        self.drawn = drawn
        self.table = 0  # `Step.table` of the step whose page table is there
        self.page_table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.rope_bases = torch.ones(rows, dtype=torch.float64, device=device) if is_dynamic(model.config) else None
        room += max_batch_size * width
        self.header = torch.zeros(room, dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"
        # Two pieces: one may still be on its way while the other is filled.
        self._hosts = [torch.empty(room, dtype=torch.int32, pin_memory=self._pinned) for _ in range(2)]
        self._arrays = [host.numpy() for host in self._hosts]
        # The pieces that are copied, of the latest step from each: most steps are as long as the last.
        self._pieces: list[tuple[tuple[int, ...], tuple[Tensor, ...]]] = [((), ()), ((), ())]

    def host(self, number: int, lengths: list[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The integers of a step of this `number`, to be written: its header, and its page table, flat."""
        header, table = lengths
        integers = self._arrays[number % 2]
        return integers[:header], integers[header : header + table]

    def integers(self, number: int, lengths: list[int]) -> NDArray[np.int32]:
        """Both in one piece."""
        return self._arrays[number % 2][: sum(lengths)]

    def send(self, step: Step, number: int) -> None:
        """What `host` was filled with for this step, or another rank's step of the same `number`, to the device."""
        array = self._arrays[number % 2][: len(step.integers)]
        if not np.may_share_memory(step.integers, array):  # by their bounds, which say it of such pieces
            array[:] = step.integers
        lengths = (*step.lengths, step.width)
        known, pieces = self._pieces[number % 2]
        if known != lengths:
            pieces = self._pieces_of(number % 2, *lengths)
            self._pieces[number % 2] = lengths, pieces
        host, there, table, rows = pieces
        there.copy_(host, non_blocking=True)
        if len(table):
            rows.copy_(table)
            self.table = step.table
        if self.rope_bases is not None and step.bases:
            bases = torch.tensor(step.bases, dtype=torch.float64)
            bases = bases.pin_memory() if self._pinned else bases
            self.rope_bases[: len(bases)].copy_(bases, non_blocking=True)

    def _pieces_of(self, number: int, header: int, size: int, width: int) -> tuple[Tensor, ...]:
        """The integers of a step on the host and on the device, and of these the page table and where it goes."""
        there = self.header[: header + size]
        table = there[header:].view(-1, width or 1)
        return self._hosts[number][: header + size], there, table, self.page_table[: len(table), :width]
