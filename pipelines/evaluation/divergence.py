"""How far a candidate's next-token distribution is from the base's, without keeping the whole vocabulary.

Of the base, per scored token, the TOP largest log-probabilities and the log of all the rest are kept. KL over these
TOP + 1 outcomes never exceeds the KL over the vocabulary (merging outcomes loses information: the data-processing
inequality), so what is reported is a **lower bound** of KL(base || candidate). With its loss, a token takes
64 * (4 + 2) + 4 + 4 = 392 bytes in a vocabulary of up to 65536, for which ids of 16 bits do, else 520.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.evaluation.perplexity import Piece

TOP = 64


class BaseDistribution:
    """Measures what is kept of the base: `logprobs` float32 [N, k] falling, their `ids` [N, k], and `rest` float32 [N],
    the log-probability of all other ids together; k is TOP, or all but one of a smaller vocabulary."""

    def __init__(self, num_tokens: int, vocab_size: int) -> None:
        width = min(TOP, vocab_size - 1)
        self.logprobs = torch.empty(num_tokens, width)
        self.ids = torch.empty(num_tokens, width, dtype=torch.uint16 if vocab_size <= 1 << 16 else torch.int32)
        self.rest = torch.empty(num_tokens)

    def add(self, piece: Piece) -> None:
        top, ids = piece.logits.topk(self.ids.shape[1], dim=1)
        self.logprobs[piece.places] = (top - piece.totals[:, None]).cpu()
        self.ids[piece.places] = ids.to(self.ids.dtype).cpu()
        self.rest[piece.places] = (_logsumexp_without(piece.logits, ids) - piece.totals).cpu()


class Divergence:
    """Measures a candidate against a kept base: `kl` float64 [N] in nats, and `agrees` bool [N], whether the most
    likely token is the base's."""

    def __init__(self, logprobs: Tensor, ids: Tensor, rest: Tensor) -> None:
        self._logprobs, self._ids, self._rest = logprobs, ids, rest
        self.kl = torch.full((len(rest),), torch.nan, dtype=torch.float64)
        self.agrees = torch.zeros(len(rest), dtype=torch.bool)

    def add(self, piece: Piece) -> None:
        ids = self._ids[piece.places].to(piece.logits.device, torch.int64)
        top = piece.logits.gather(1, ids) - piece.totals[:, None]
        rest = _logsumexp_without(piece.logits, ids) - piece.totals
        candidate = torch.cat([top, rest[:, None]], dim=1).cpu().double()
        base = torch.cat([self._logprobs[piece.places], self._rest[piece.places, None]], dim=1).double()
        self.kl[piece.places] = torch.nn.functional.kl_div(candidate, base, reduction="none", log_target=True).sum(1)
        self.agrees[piece.places] = (piece.logits.argmax(1) == ids[:, 0]).cpu()


def _logsumexp_without(logits: Tensor, ids: Tensor) -> Tensor:
    """logsumexp over the columns that are not in `ids`: no subtraction, so a tiny rest keeps its digits."""
    return logits.scatter(1, ids, -torch.inf).logsumexp(1)
