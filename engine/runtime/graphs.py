"""Decode steps as CUDA graphs: one for each of a list of batch sizes, over one pool of memory."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from itertools import count, takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels import ops
from engine.models.batch import Batch
from engine.models.cache import KVCache
from engine.models.decoder import Decoder
from engine.models.rope_scaling import is_dynamic
from engine.runtime.batch import Step, token_ids
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import Sequence

# Rows of the integers that go to the device with each step.
FIELDS = 5
IDS, POSITIONS, LENGTHS, IGNORES, SLOTS = range(FIELDS)


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 32, 64, then steps of 32 up to 256 and of 64 beyond; the last one is `most`. Steps are small
    where a padded row costs, and few, since every graph costs start time."""
    sizes = [*(1 << power for power in range(7)), *range(96, 257, 32)]
    sizes += takewhile(lambda size: size < most, count(320, 64))
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Steps in which every sequence computes one token and draws the next. The cache must have a page more than are
    given out, its last, which padded rows write to."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        drawn: Tensor,
        *,
        eos_token_ids: tuple[int, ...],
        max_batch_size: int,
        session_len: int,
        sizes: list[int],
    ) -> None:
        """Captures a graph for each of `sizes`. `drawn` int64 [max_batch_size] holds the tokens of the step before and,
        after a replay, the likeliest ones of this step, without `eos_token_ids` where a request ignores them."""
        self._model, self._cache, self._drawn = model, cache, drawn
        self._sizes = sizes
        device = model.device
        self._width = -(-session_len // cache.page_len)
        self._spare_slot = (cache.num_pages - 1) * cache.page_len
        self._header = torch.zeros(FIELDS, max_batch_size, dtype=torch.int32, device=device)
        self._table = torch.zeros(max_batch_size, self._width, dtype=torch.int32, device=device)
        self._bases = (
            torch.ones(max_batch_size, dtype=torch.float64, device=device) if is_dynamic(model.config) else None
        )
        self._eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self._rows = torch.arange(max_batch_size + 1, dtype=torch.int32, device=device)
        # The blocks of prompts: there are none, but an invariant batch takes each token for one.
        self._blocks = torch.stack([self._rows, torch.zeros_like(self._rows)], dim=1)
        # Two sets of what is sent: one may still be on its way while the other is filled.
        room = (FIELDS + self._width) * max_batch_size
        self._hosts = [torch.empty(room, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._staging = torch.empty(room, dtype=torch.int32, device=device)
        self._draws = model.ranks is None or model.ranks.rank == 0
        rows = max_batch_size if self._draws else 0
        self.logits = torch.empty(rows, model.config.vocab_size, dtype=model.dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        self._header[SLOTS] = self._spare_slot
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            self._capture(size, pool)

    def fits(self, plan: Plan) -> bool:
        sequences = plan.sequences
        return len(sequences) <= self._sizes[-1] and all(one.scheduled == 1 and one.draws for one in sequences)

    def step_of(self, plan: Plan, rows: Mapping[Sequence, int], number: int, *, padded: bool = False) -> Step:
        """What a plan that fits is computed from. `rows` is that of `build_batch`, `number` that of this step. With
        `padded` the largest graph runs whatever the plan holds."""
        sequences = plan.sequences
        count = len(sequences)
        size = self._sizes[-1] if padded else next(size for size in self._sizes if size >= count)
        width = max(len(sequence.pages) for sequence in sequences)
        integers = self._hosts[number % 2].numpy()[: FIELDS * size + count * width]
        self._fill(sequences, rows, integers, size)
        bases = [sequence.rope_base for sequence in sequences if sequence.rope_base is not None]
        lengths = [FIELDS * size, count * width]
        return Step(
            integers=integers, lengths=lengths, draws=count, width=width, decodes=count, bases=bases, graph=size
        )

    def replay(self, step: Step, number: int) -> None:
        """Compute a step, of this rank's `step_of` or of rank 0's, which has the same `number`."""
        host = self._hosts[number % 2][: len(step.integers)]
        if not np.shares_memory(step.integers, host.numpy()):
            host.numpy()[:] = step.integers
        self._send(step, host)
        self._graphs[step.graph].replay()

    def _fill(
        self, sequences: Items[Sequence], rows: Mapping[Sequence, int], array: NDArray[np.int32], size: int
    ) -> None:
        """The integers of a step as the graph of `size` sequences reads them."""
        number = len(sequences)
        header = array[: FIELDS * size].reshape(FIELDS, size)
        table = array[FIELDS * size :].reshape(number, -1)
        header[IDS, :number] = [token_ids(sequence, rows)[0] for sequence in sequences]
        cached = np.array([sequence.cached for sequence in sequences], dtype=np.int32)
        header[POSITIONS, :number] = cached
        header[LENGTHS, :number] = cached + 1
        header[IGNORES, :number] = [sequence.sampling.ignore_eos for sequence in sequences]
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        page_len = self._cache.page_len
        header[SLOTS, :number] = table[np.arange(number), cached // page_len] * page_len + cached % page_len
        header[:SLOTS, number:] = 0
        header[SLOTS, number:] = self._spare_slot

    def _send(self, step: Step, host: Tensor) -> None:
        """The integers of a step, in one copy, to where its graph reads them."""
        size, width = step.graph, step.width
        self._staging[: len(host)].copy_(host, non_blocking=True)
        header, table = torch.split(self._staging[: len(host)], step.lengths)
        self._header[:, :size].copy_(header.view(FIELDS, size))
        self._table[: step.draws, :width].copy_(table.view(step.draws, width))
        if self._bases is not None:
            bases = torch.tensor(step.bases, dtype=torch.float64).pin_memory()
            self._bases[: step.draws].copy_(bases, non_blocking=True)

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> None:
        self._step(size)  # compiles, and lets libraries take the memory that they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL has threads of its own, which must not break off the capture.
        mode = "global" if self._model.ranks is None else "thread_local"
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            self._step(size)
        self._graphs[size] = graph

    def _step(self, size: int) -> None:
        deterministic = self._model.deterministic
        batch = Batch(
            token_ids=self._header[IDS, :size],
            drawn=self._drawn,
            positions=self._header[POSITIONS, :size],
            query_starts=self._rows[: size + 1],
            context_lens=self._header[LENGTHS, :size],
            page_table=self._table[:size],
            slots=self._header[SLOTS, :size],
            logits_at=self._rows[:size],
            rope_bases=None if self._bases is None else self._bases[:size],
            decodes=0 if deterministic else size,
            blocks=self._blocks[: size if deterministic else 0],
            invariant=deterministic,
        )
        logits = self._model.logits(batch, self._cache)
        ranks, drawn = self._model.ranks, self._drawn[:size]
        if self._draws:
            ops.likeliest(logits, self._header[IGNORES, :size], self._eos, drawn, self.logits[:size])
        if ranks is not None:
            ranks.share(drawn)
