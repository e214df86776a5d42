"""Runs a plan on the device: the only part of the runtime that calls the model."""

from __future__ import annotations

from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from engine.models.cache import KVCache
from engine.models.decoder import Decoder
from engine.runtime.batch import build_batch
from engine.runtime.event import TokenLogprob
from engine.runtime.logprobs import token_logprobs
from engine.runtime.sampler import collect_draws, sample
from engine.runtime.scheduler import Plan


class Drawn(NamedTuple):
    """The new tokens of a step, and the log-probabilities of those whose request asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


class Runner:
    """One model and its KV cache on one device.

    A plan goes in as plain numbers and tokens come out as plain numbers, so what lies between them, one rank or
    several, launched kernel by kernel or as one graph, is decided in `logits` and concerns nobody else.
    """

    def __init__(self, model: Decoder, cache: KVCache, *, eos_token_ids: tuple[int, ...]) -> None:
        self._model = model
        self._cache = cache
        self._eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def logits(self, plan: Plan) -> Tensor:
        """Compute a plan: K and V of its tokens are in the cache afterwards. Returns float32 [R, vocab] for the rows
        that the plan wants, in its order."""
        batch = build_batch(plan, page_len=self._cache.page_len, device=self._model.device)
        return self._model(batch, self._cache)

    @torch.inference_mode()
    def run(self, plan: Plan) -> Drawn:
        """Compute a plan and draw the new tokens of `plan.drawing`."""
        logits = self.logits(plan)
        drawing = plan.drawing
        if not drawing:
            return Drawn([], [])
        token_ids = sample(logits, collect_draws(drawing, eos_token_ids=self._eos_token_ids))
        logprobs = token_logprobs(logits, token_ids, [sequence.sampling.logprobs for sequence in drawing])
        return Drawn(token_ids.tolist(), logprobs)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device right now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
