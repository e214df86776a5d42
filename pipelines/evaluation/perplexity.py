"""Negative log-likelihood per scored token, gathered from logits that come in pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from pipelines.evaluation.statistics import Estimate, mean_over_items
from pipelines.evaluation.texts import Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The scored part of some logits: float32 rows [n, vocab] and their logsumexp `totals` [n], the token that each row
    should have foreseen, and where their figures belong among those of all scored tokens."""

    logits: Tensor
    totals: Tensor
    targets: Tensor
    places: slice


class Measure(Protocol):
    """What is taken from the logits of every scored token, piece by piece."""

    def add(self, piece: Piece) -> None: ...


class Scoring:
    """Routes the logits that an engine scores to measures: an engine's `on_logits` is `Scoring.on_logits`.

    The scored tokens of all items, item after item, have the places 0 .. num_tokens - 1.
    """

    def __init__(self, items: Sequence[Item], measures: Sequence[Measure]) -> None:
        self.counts = [item.num_scored for item in items]
        self.num_tokens = sum(self.counts)
        self._items = items
        self._starts = [0, *accumulate(self.counts)]
        self._measures = measures
        self._num_seen = 0

    @torch.inference_mode()
    def on_logits(self, item: int, start: int, logits: Tensor) -> None:
        """Row j of `logits` is said after the token at position start + j, so it is scored on the token after that."""
        ids, first = self._items[item].token_ids, self._items[item].first_scored
        begin, end = max(start + 1, first), min(start + 1 + len(logits), len(ids))
        if begin >= end:
            return
        place = self._starts[item] + begin - first
        rows = logits[begin - start - 1 : end - start - 1]
        piece = Piece(
            logits=rows,
            totals=rows.logsumexp(1),
            targets=torch.tensor(ids[begin:end], dtype=torch.int64, device=logits.device),
            places=slice(place, place + end - begin),
        )
        for measure in self._measures:
            measure.add(piece)
        self._num_seen += end - begin

    def finish(self) -> None:
        """RuntimeError unless every scored token was seen exactly as often as it should be."""
        if self._num_seen != self.num_tokens:
            raise RuntimeError(f"the engine gave logits of {self._num_seen} tokens where {self.num_tokens} are scored")


class TokenLoss:
    """Measures the negative log-likelihood (natural logarithm) of every scored token: float64 [num_tokens]."""

    def __init__(self, num_tokens: int) -> None:
        self.values = torch.full((num_tokens,), math.nan, dtype=torch.float64)

    def add(self, piece: Piece) -> None:
        right = piece.logits.gather(1, piece.targets[:, None])[:, 0]
        self.values[piece.places] = (piece.totals - right).double().cpu()


def sums_by_item(values: Tensor, counts: Sequence[int]) -> list[float]:
    """The sum of a per-token figure over each item."""
    ends = list(accumulate(counts))
    return [float(values[end - count : end].double().sum()) for count, end in zip(counts, ends, strict=True)]


def perplexity(losses: Tensor, counts: Sequence[int], *, confidence: float = 0.95) -> Estimate:
    """exp of the mean loss over all scored tokens, with the interval over items."""
    return mean_over_items(sums_by_item(losses, counts), counts, confidence=confidence).exp()


def perplexity_ratio(candidate: Tensor, base: Tensor, counts: Sequence[int], *, confidence: float) -> Estimate:
    """Perplexity of the candidate over that of the base, paired: the interval is of the mean difference, so what both
    find hard cancels out."""
    return mean_over_items(sums_by_item(candidate - base, counts), counts, confidence=confidence).exp()
