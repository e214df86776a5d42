"""Runs a plan on the device: the only part of the runtime that calls the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import ops
from engine.models.batch import Batch
from engine.models.cache import KVCache
from engine.models.decoder import Decoder
from engine.runtime.batch import Step, batch_of, step_of
from engine.runtime.event import TokenLogprob
from engine.runtime.graphs import Graphs, graph_sizes
from engine.runtime.logprobs import token_logprobs
from engine.runtime.rank_processes import RankProcesses
from engine.runtime.sampler import collect_draws, moved, sample
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import Sequence


class Drawn(NamedTuple):
    """The new tokens of a step, and the log-probabilities of those whose request asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


# A launched step: called, it waits for the device and says what was drawn.
Launch = Callable[[], Drawn]


class Runner:
    """One model and its KV cache on one device.

    A plan goes in as plain numbers and tokens come out as plain numbers, so what lies between them, one rank or
    several, launched kernel by kernel or as one graph, is decided here and concerns nobody else.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        eos_token_ids: tuple[int, ...],
        max_batch_size: int = 64,
        num_tokens_per_iter: int = 512,
        session_len: int = 0,
        graphs: bool = True,
        others: RankProcesses | None = None,
    ) -> None:
        """On a GPU, with `graphs`, captures the steps of up to `num_tokens_per_iter` tokens of sessions of up to
        `session_len`. Rank 0 of several has the `others`, which `follow` what it launches."""
        self._model = model
        self._others = others
        self._cache = cache
        self._eos_token_ids = eos_token_ids
        self._eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=model.device)
        self._step = 0
        self._rows: Mapping[Sequence, int] = {}
        self._on_gpu = model.device.type == "cuda"
        # How many steps may be launched before the tokens of the first are read.
        self.depth = 1 if self._on_gpu else 0
        self._drawn = torch.zeros(max_batch_size, dtype=torch.int64, device=model.device)
        # Two of each: the tokens of a step may be unread while those of the next come.
        self._hosts = [torch.zeros(max_batch_size, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)]
        self._done = [torch.cuda.Event() for _ in range(2 * self._on_gpu)]  # type: ignore[no-untyped-call]
        self._graphs: Graphs | None = None
        if self._on_gpu and graphs:
            self._graphs = Graphs(
                model,
                cache,
                self._drawn,
                eos_token_ids=eos_token_ids,
                max_batch_size=max_batch_size,
                session_len=session_len,
                sizes=graph_sizes(model, cache, max_batch_size=max_batch_size, num_tokens_per_iter=num_tokens_per_iter),
            )

    @torch.inference_mode()
    def logits(self, plan: Plan) -> Tensor:
        """Compute a plan: K and V of its tokens are in the cache afterwards. Returns float32 [R, vocab] for the rows
        that the plan wants, in its order."""
        with self._together():
            return self._logits(self._step_of(plan), share=False).float()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launch:
        """Start to compute a plan and to draw the new tokens of `plan.drawing`. At most `depth` more steps are launched
        before this one is asked what it drew. RankError where another rank cannot go on."""
        with self._together():
            return self._launch(plan)

    def _launch(self, plan: Plan) -> Launch:
        drawing = plan.drawing
        number = len(drawing)
        self._step += 1
        greedy = all(map(attrgetter("greedy"), drawing))
        logprobs: list[TokenLogprob | None] = [None] * number
        graphs = self._graphs
        step = None if graphs is None else graphs.step_of(plan, self._rows, self._step)
        if replayed := graphs is not None and step is not None:
            step = step if greedy else replace(step, sampled=True)
            self._tell(step)
            graphs.replay(step, self._step)
            logits = graphs.logits
        else:
            logits = self._logits(self._step_of(plan), share=True)
        if drawing and not greedy:
            wide = logits[:number].float()
            tokens = sample(wide, collect_draws(drawing, eos_token_ids=self._eos_token_ids))
            logprobs = token_logprobs(wide, tokens, [sequence.sampling.logprobs for sequence in drawing])
            self._drawn[:number] = tokens
        elif drawing and not replayed:  # a graph takes the likeliest tokens itself
            ignoring = moved([sequence.sampling.ignore_eos for sequence in drawing], torch.bool, logits.device)
            ops.likeliest(logits, ignoring, self._eos, self._drawn[:number])
        if not (replayed and greedy):
            self._share(number)
        self._rows = {sequence: row for row, sequence in enumerate(drawing)}
        read = self._read(number)
        return lambda: Drawn(read(), logprobs)

    def run(self, plan: Plan) -> Drawn:
        """Compute a plan and draw the new tokens of `plan.drawing`."""
        return self.launch(plan)()

    @torch.inference_mode()
    def follow(self, step: Step) -> None:
        """Compute, as another rank, a step that rank 0 launches, and take over what it drew."""
        self._step += 1
        if self._graphs is not None and step.graph:
            self._graphs.replay(step, self._step)
        else:
            self._model.logits(self._batch_of(step), self._cache)
        if step.sampled or not step.graph:
            self._share(step.draws)

    def release(self) -> None:
        """Give up the graphs. A group of GPUs cannot end while there are graphs with its sums in them."""
        self._graphs = None

    def _step_of(self, plan: Plan) -> Step:
        return step_of(plan, page_len=self._cache.page_len, rows=self._rows, invariant=self._model.deterministic)

    def _batch_of(self, step: Step) -> Batch:
        return batch_of(step, device=self._model.device, drawn=self._drawn, invariant=self._model.deterministic)

    def _logits(self, step: Step, *, share: bool) -> Tensor:
        """Logits in the computing type of the rows that a step wants. With `share` the other ranks wait afterwards for
        what is drawn from them."""
        self._tell(step if share else replace(step, draws=0))
        batch = self._batch_of(step)
        return self._model.logits(batch, self._cache)

    def _tell(self, step: Step) -> None:
        if self._others is not None:
            self._others.tell({"type": "step", **step.message()})

    def _share(self, number: int) -> None:
        """The first `number` drawn tokens go from rank 0 to all ranks."""
        if number and self._model.ranks is not None:
            self._model.ranks.share(self._drawn[:number])

    def _together(self) -> AbstractContextManager[None]:
        """Around what all ranks do together."""
        return nullcontext() if self._others is None else self._others.together()

    def _read(self, number: int) -> Callable[[], list[int]]:
        """The first `number` drawn tokens, on their way to the host."""
        if not self._on_gpu:
            tokens: list[int] = self._drawn[:number].tolist()
            return lambda: tokens
        host, done = self._hosts[self._step % 2][:number], self._done[self._step % 2]
        host.copy_(self._drawn[:number], non_blocking=True)
        done.record()

        def wait() -> list[int]:
            with self._together():
                done.synchronize()
            read: list[int] = host.tolist()
            return read

        return wait
