"""Drawing tokens from logits in plain torch: the CPU path, and the specification of `draw.py`."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the numbers that say how a row is drawn.
FIELDS = 5
TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(FIELDS)
# How many of the likeliest tokens are ranked at first.
RANKED = 1024


def draw_tokens(logits: Tensor, numbers: Tensor) -> Tensor:
    """Token ids int64 [R] for logits float32 [R, vocab] and numbers float64 [R, FIELDS], each row by itself.

    A temperature of 0 takes the likeliest token, the first of several. Else probabilities are those of
    softmax(logits / temperature); what is not among the `top_k` likeliest (0: all) is dropped, then what is outside the
    smallest set of the rest that has at least the share `top_p`, then what is less likely than the share `min_p` of the
    likeliest. Tokens as likely as the last one kept are kept too. `uniform` in [0, 1) is looked up in the cumulated
    probabilities of what is left, in the order of the vocabulary.
    """
    token_ids = logits.argmax(-1)
    warm = (numbers[:, TEMPERATURE] > 0).nonzero()[:, 0]
    if len(warm):
        numbers = numbers[warm]
        probabilities = _softmax(logits[warm], numbers[:, TEMPERATURE])
        narrow = ((numbers[:, TOP_K] > 0) | (numbers[:, TOP_P] < 1)).nonzero()[:, 0]
        if len(narrow):
            probabilities[narrow] = narrowed(probabilities[narrow], numbers[narrow, TOP_K], numbers[narrow, TOP_P])
        if bool((numbers[:, MIN_P] > 0).any()):
            least = numbers[:, MIN_P].float()[:, None] * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.where(probabilities >= least, 0)
        token_ids[warm] = _invert(probabilities, numbers[:, UNIFORM])
    return token_ids


def narrowed(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities [R, vocab] with 0 for what `top_k` and `top_p` [R] drop."""
    vocabulary = probabilities.shape[-1]
    ranks, share = top_k.long().clamp_max(vocabulary)[:, None], top_p.double()[:, None]
    # Ranking a whole vocabulary costs ten times what finding its first thousand does, and those nearly always suffice.
    for width in (min(max(RANKED, int(ranks.max())), vocabulary), vocabulary):
        ranked = probabilities.topk(width).values
        least_likely = ranked.gather(-1, (ranks - 1).clamp_min(0)).where(ranks > 0, 0)
        wanted = share * probabilities.where(probabilities >= least_likely, 0).sum(-1, keepdim=True, dtype=torch.double)
        likely = ranked.where(ranked >= least_likely, 0)
        cumulated = likely.cumsum(-1, dtype=torch.float64)
        inside = cumulated - likely < wanted
        if width == vocabulary or not bool((inside[:, -1] & (ranks == 0)[:, 0]).any()):
            break
    inside[:, 0] = True
    least = likely.where(inside & (likely > 0), torch.inf).amin(-1, keepdim=True)
    return probabilities.where(probabilities >= least, 0)


def _softmax(logits: Tensor, temperatures: Tensor) -> Tensor:
    """With the maximum taken off first any temperature above 0 is harmless: what overflows is a probability of 0."""
    temperature = temperatures.float().clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulated probability exceeds the uniform's share of the sum; its own is above 0."""
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    share = uniforms[:, None] * cumulated[:, -1:]
    # Logits that are no numbers have no such token: then it is the last, and the engine lives.
    return torch.searchsorted(cumulated, share, right=True)[:, 0].clamp_max(cumulated.shape[-1] - 1)
