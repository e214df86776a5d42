"""Log-probabilities of the tokens that were drawn, for the requests that ask for them."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from engine.runtime.event import TokenLogprob


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: Items[int | None]) -> list[TokenLogprob | None]:
    """One entry for each row of logits float32 [R, vocab]; None where `counts` is.

    They are those of softmax(logits), the model's own distribution: whatever temperature, penalties or a grammar made
    of it when the token was drawn. The likeliest come first, and the drawn token need not be among them.
    """
    found: list[TokenLogprob | None] = [None] * len(counts)
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return found
    chosen = token_ids[rows]
    logprobs = logits[rows].log_softmax(-1)
    own = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
    most = min(max(count or 0 for count in counts), logits.shape[-1])
    values, ids = torch.topk(logprobs, most)
    for row, token, logprob, ranked, ranked_ids in zip(
        rows, chosen.tolist(), own, values.tolist(), ids.tolist(), strict=True
    ):
        top = tuple(zip(ranked_ids, ranked, strict=True))[: counts[row]]
        found[row] = TokenLogprob(token_id=token, logprob=logprob, top=top)
    return found
