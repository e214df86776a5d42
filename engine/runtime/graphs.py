"""Steps as CUDA graphs: one for each of a list of batch sizes, and of numbers of tokens where prompts are among them,
over one pool of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels import ops
from engine.models.batch import Batch
from engine.models.cache import KVCache
from engine.models.decoder import Decoder
from engine.runtime import decode_steps, mixed_steps
from engine.runtime.batch import Size, Step
from engine.runtime.decode_steps import DecodeSteps, batch_sizes
from engine.runtime.mixed_steps import MixedSteps, mixed_sizes
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import Sequence
from engine.runtime.staging import Staging


class Sizes(NamedTuple):
    """Which graphs there are, in order: for so many sequences that decode, and for mixed steps. `uneven` are those of
    `decode` that have a second one, for contexts of unequal lengths (docs/decisions/0097)."""

    decode: list[int]
    mixed: list[Size]
    uneven: list[int]

    @property
    def largest(self) -> Sizes:
        """The graphs whose memory the others fit into."""
        last = self.decode[-1:]
        return Sizes(last, self.mixed[-1:], [size for size in self.uneven if size in last])

    @property
    def number(self) -> int:
        return len(self.decode) + len(self.mixed) + len(self.uneven)


def graph_sizes(model: Decoder, cache: KVCache, *, max_batch_size: int, num_tokens_per_iter: int) -> Sizes:
    """The graphs of an engine, the same in all ranks. A `deterministic` model has none of mixed steps: it launches each
    product once for every tile of tokens, thousands of kernels in a graph; and its attention minds no lengths."""
    decode = batch_sizes(max_batch_size)
    if model.deterministic:
        return Sizes(decode, [], [])

    def minds_lengths(size: int) -> bool:
        found = ops.minds_lengths(cache.layers[0], model.config.num_heads, size)
        # Ranks on other kinds of GPUs may have other tables.
        return found if model.ranks is None else bool(model.ranks.least(found, model.device))

    mixed = mixed_sizes(budget=num_tokens_per_iter, max_batch_size=max_batch_size)
    return Sizes(decode, mixed, [size for size in decode if minds_lengths(size)])


class Graphs:
    """Steps that are computed as they were captured. The cache must have a page more than are given out, its last,
    which padded rows write to."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        drawn: Tensor,
        *,
        eos_token_ids: tuple[int, ...],
        max_batch_size: int,
        session_len: int,
        sizes: Sizes,
        captured: bool = True,
    ) -> None:
        """Captures a graph for each of `sizes`. `drawn` int64 [max_batch_size] holds the tokens of the step before and,
        after a replay, the likeliest ones of this step, without `eos_token_ids` where a request ignores them. What is
        not `captured` is computed kernel by kernel, padded all the same: on a CPU too."""
        self._model, self._cache, self._drawn = model, cache, drawn
        device = model.device
        rooms = [decode_steps.room_for(Size(size)) for size in sizes.decode]
        rooms += [mixed_steps.room_for(size) for size in sizes.mixed]
        self._staging = Staging(
            model, cache, drawn, room=max(rooms), max_batch_size=max_batch_size, session_len=session_len
        )
        self._decode = DecodeSteps(
            self._staging,
            sizes.decode,
            uneven=sizes.uneven,
            deterministic=model.deterministic,
        )
        self._mixed = MixedSteps(self._staging, sizes.mixed)
        self._eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self._draws = model.ranks is None or model.ranks.rank == 0
        rows = max_batch_size if self._draws else 0
        self.logits = torch.empty(rows, model.config.vocab_size, dtype=model.dtype, device=device)
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        if captured:
            pool = torch.cuda.graph_pool_handle()
            # The largest first: the others fit into its memory.
            for size in sorted([*self._decode.sizes, *self._mixed.sizes], reverse=True):
                self._capture(size, pool)

    def step_of(self, plan: Plan, rows: Mapping[Sequence, int], number: int) -> Step | None:
        """What a plan is computed from by a graph; None where none fits. `rows` is that of `build_batch`, `number` that
        of this step."""
        for steps in (self._decode, self._mixed):
            if (size := steps.size_for(plan)) is not None:
                return steps.step_of(plan, rows, number, size)
        return None

    def replay(self, step: Step, number: int) -> None:
        """Compute a step, of this rank's `step_of` or of rank 0's, which has the same `number`."""
        assert step.graph is not None
        self._staging.send(step, number)
        if self._graphs:
            self._graphs[step.graph].replay()
        else:
            self._compute(step.graph, self._model.logits)

    @torch.inference_mode()
    def _capture(self, size: Size, pool: Any) -> None:
        steps = self._mixed if size.room else self._decode
        self._staging.send(steps.step_of(Plan(()), {}, 0, size), 0)  # a step of nothing but padding
        self._compute(size, self._model.rehearse)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL has threads of its own, which must not break off the capture.
        mode = "global" if self._model.ranks is None else "thread_local"
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            self._compute(size, self._model.logits)
        self._graphs[size] = graph

    def _compute(self, size: Size, logits_of: Callable[[Batch, KVCache], Tensor]) -> None:
        steps = self._mixed if size.room else self._decode
        batch = steps.batch(size)
        logits = logits_of(batch, self._cache)
        ranks, rows = self._model.ranks, len(batch.logits_at)
        drawn = self._drawn[:rows]
        if self._draws:
            ops.likeliest(logits, steps.ignoring(size), self._eos, drawn, self.logits[:rows])
        if ranks is not None:
            ranks.share(drawn)
