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
from engine.kernels import ops
from engine.runtime.sequence import Sequence


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


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """Token ids int64 [R] for logits float32 [R, vocab], which stay as they are. A GPU is not waited for."""
    device = logits.device
    if draws.seen[0] or draws.shifted[0] or draws.banned[0] or draws.masks:
        logits = logits.clone()
    if draws.seen[0]:
        _penalize(logits, draws)
    if draws.shifted[0]:
        rows, tokens = (moved(values, torch.int64, device) for values in draws.shifted[:2])
        logits[rows, tokens] += moved(draws.shifted[2], torch.float32, device)
    if draws.banned[0]:
        rows, tokens = (moved(values, torch.int64, device) for values in draws.banned)
        logits[rows, tokens] = -torch.inf
    if draws.masks:
        _mask(logits, draws.masks)
    numbers = [
        (option.temperature, option.top_k, option.top_p, option.min_p, uniform)
        for option, uniform in zip(draws.options, draws.uniforms, strict=True)
    ]
    return ops.draw_tokens(logits, moved(numbers, torch.float64, device))


def moved(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers on a device; on its way to a GPU, when this returns."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
    device = logits.device
    rows = moved(list(masks), torch.int64, device)
    words = torch.stack([torch.frombuffer(mask, dtype=torch.int32) for mask in masks.values()])
    words = words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device) & 1
    allowed = bits.flatten(1)[:, : logits.shape[-1]] == 1
    logits[rows] = logits[rows].where(allowed, -torch.inf)


def _penalize(logits: Tensor, draws: Draws) -> None:
    rows, tokens = (moved(index, torch.int64, logits.device) for index in draws.seen)
    penalties = [option.repetition_penalty for option in draws.options]
    penalty = moved(penalties, torch.float32, logits.device)[rows]
    seen = logits[rows, tokens]
    # A token seen twice is written twice with the same value: the penalty counts once.
    logits[rows, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)
