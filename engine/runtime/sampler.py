"""From logits to tokens: greedy, or drawn from the distribution that temperature, top-k, top-p and min-p leave.

A logit is changed in this order: repetition penalty, bias and OpenAI's penalties, banned tokens, grammar.

What a row gives depends on that row alone. Its random number is a hash of (seed, position), not the state of a
generator, and it is looked up in the cumulated probabilities in the order of the vocabulary, so a request with a seed
has the same answer alone, in a batch, and after a preemption.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from engine.config import Sampling
from engine.runtime.sequence import Sequence

# How many of the likeliest tokens are ranked at first.
RANKED = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How each row of logits is sampled: `options`, and `uniforms` in [0, 1). The rest concerns some rows alone:

    - `seen`: the tokens of the rows with a repetition penalty, as (row, token) pairs of index lists.
    - `shifted`: what is added to logits, as (row, token, amount) lists; no pair comes twice.
    - `banned`: (row, token) pairs that cannot be drawn.
    - `masks`: for a row, the tokens that can be drawn: bit t % 32 of word t // 32 is token t.
    """

    options: Items[Sampling]
    uniforms: Items[float]
    seen: tuple[list[int], list[int]] = ([], [])
    shifted: tuple[list[int], list[int], list[float]] = ([], [], [])
    banned: tuple[list[int], list[int]] = ([], [])
    masks: Mapping[int, array[int]] = field(default_factory=dict)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of a request: 40 bits of a hash, so that its product with a sum of
    float64 probabilities always stays below that sum."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=5).digest(), "little") * 2.0**-40


def collect_draws(sequences: Items[Sequence], *, eos_token_ids: Items[int]) -> Draws:
    """What the sampler needs from the sequences that draw. With `ignore_eos` an end token cannot be drawn."""
    seen: tuple[list[int], list[int]] = ([], [])
    shifted: tuple[list[int], list[int], list[float]] = ([], [], [])
    banned: tuple[list[int], list[int]] = ([], [])
    masks: dict[int, array[int]] = {}
    for row, sequence in enumerate(sequences):
        if sequence.sampling.repetition_penalty != 1:
            seen[0].extend([row] * len(sequence))
            seen[1].extend(sequence.tokens)
        if shifts := _shifts(sequence):
            shifted[0].extend([row] * len(shifts))
            shifted[1].extend(shifts.keys())
            shifted[2].extend(shifts.values())
        if sequence.sampling.ignore_eos:
            banned[0].extend([row] * len(eos_token_ids))
            banned[1].extend(eos_token_ids)
        if sequence.constraint is not None:
            masks[row] = sequence.constraint.allowed(sequence.answer)
    return Draws(
        options=[sequence.sampling for sequence in sequences],
        uniforms=[uniform(sequence.seed, len(sequence)) for sequence in sequences],
        seen=seen,
        shifted=shifted,
        banned=banned,
        masks=masks,
    )


def likeliest(logits: Tensor, ignoring: Tensor, eos_token_ids: Tensor, out: Tensor) -> None:
    """Writes the likeliest token of each row of logits [R, vocab] to `out` int64 [R]; without the end tokens where
    `ignoring` [R] is true, for which `logits` is changed."""
    if len(eos_token_ids):
        ends = logits[:, eos_token_ids].masked_fill(ignoring[:, None], -torch.inf)
        logits[:, eos_token_ids] = ends
    torch.argmax(logits, dim=-1, out=out)


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """Token ids int64 [R] for logits float32 [R, vocab], which stay as they are."""
    if draws.seen[0] or draws.shifted[0] or draws.banned[0] or draws.masks:
        logits = logits.clone()
    if draws.seen[0]:
        _penalize(logits, draws)
    if draws.shifted[0]:
        rows, tokens, amounts = (torch.tensor(values, device=logits.device) for values in draws.shifted)
        logits[rows, tokens] += amounts
    if draws.banned[0]:
        rows, tokens = (torch.tensor(index, device=logits.device) for index in draws.banned)
        logits[rows, tokens] = -torch.inf
    if draws.masks:
        _mask(logits, draws.masks)
    token_ids = logits.argmax(-1)
    warm = [row for row, option in enumerate(draws.options) if option.temperature > 0]
    if warm:
        options = [draws.options[row] for row in warm]
        probabilities = _softmax(logits[warm], [option.temperature for option in options])
        narrow = [row for row, option in enumerate(options) if option.top_k or option.top_p < 1]
        if narrow:
            probabilities[narrow] = _narrow(probabilities[narrow], [options[row] for row in narrow])
        if any(option.min_p for option in options):
            share = torch.tensor([option.min_p for option in options], device=logits.device)[:, None]
            probabilities = probabilities.where(probabilities >= share * probabilities.amax(-1, keepdim=True), 0)
        token_ids[warm] = _invert(probabilities, [draws.uniforms[row] for row in warm])
    return token_ids


def _shifts(sequence: Sequence) -> dict[int, float]:
    """Token -> what is added to its logit: the bias, less the penalties of the tokens that the answer has."""
    sampling = sequence.sampling
    shifts = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in Counter(sequence.answer).items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            shifts[token] = shifts.get(token, 0.0) - penalty
    return shifts


def _mask(logits: Tensor, masks: Mapping[int, array[int]]) -> None:
    rows = torch.tensor(list(masks), device=logits.device)
    words = torch.stack([torch.frombuffer(mask, dtype=torch.int32) for mask in masks.values()]).to(logits.device)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    allowed = bits.flatten(1)[:, : logits.shape[-1]] == 1
    logits[rows] = logits[rows].where(allowed, -torch.inf)


def _penalize(logits: Tensor, draws: Draws) -> None:
    rows, tokens = (torch.tensor(index, device=logits.device) for index in draws.seen)
    penalty = torch.tensor([option.repetition_penalty for option in draws.options], device=logits.device)[rows]
    seen = logits[rows, tokens]
    # A token seen twice is written twice with the same value: the penalty counts once.
    logits[rows, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _softmax(logits: Tensor, temperatures: list[float]) -> Tensor:
    """With the maximum taken off first any temperature above 0 is harmless: what overflows is a probability of 0."""
    temperature = torch.tensor(temperatures, device=logits.device).clamp_min(torch.finfo(torch.float32).tiny)
    return ((logits - logits.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)


def _narrow(probabilities: Tensor, options: list[Sampling]) -> Tensor:
    """Set to 0 what is not among the k likeliest, then what is outside the smallest set of the rest that has at least
    the share top_p. Tokens as likely as the last one kept are kept too."""
    device, vocabulary = probabilities.device, probabilities.shape[-1]
    ranks = torch.tensor([min(option.top_k, vocabulary) for option in options], device=device)[:, None]
    top_p = torch.tensor([option.top_p for option in options], dtype=torch.float64, device=device)[:, None]
    # Ranking a whole vocabulary costs ten times what finding its first thousand does, and those nearly always suffice.
    for width in (min(max(RANKED, *(option.top_k for option in options)), vocabulary), vocabulary):
        ranked = probabilities.topk(width).values
        least_likely = ranked.gather(-1, (ranks - 1).clamp_min(0)).where(ranks > 0, 0)
        share = top_p * probabilities.where(probabilities >= least_likely, 0).sum(-1, keepdim=True, dtype=torch.float64)
        likely = ranked.where(ranked >= least_likely, 0)
        cumulated = likely.cumsum(-1, dtype=torch.float64)
        inside = cumulated - likely < share
        if width == vocabulary or not bool((inside[:, -1] & (ranks == 0)[:, 0]).any()):
            break
    inside[:, 0] = True
    least = likely.where(inside & (likely > 0), torch.inf).amin(-1, keepdim=True)
    return probabilities.where(probabilities >= least, 0)


def _invert(probabilities: Tensor, uniforms: list[float]) -> Tensor:
    """The first token whose cumulated probability exceeds the uniform's share of the sum; its own is above 0."""
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    share = torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)[:, None] * cumulated[:, -1:]
    # Logits that are no numbers have no such token: then it is the last, and the engine lives.
    return torch.searchsorted(cumulated, share, right=True)[:, 0].clamp_max(cumulated.shape[-1] - 1)
