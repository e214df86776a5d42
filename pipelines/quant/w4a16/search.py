"""The linears that read one input: every scale that may help is tried, the best is kept, and the weights are rounded.

What is compared is the error of the outputs, trace(d G d^T), that is left when all is done: with error feedback that
is the error after it. No scaling is always among what is tried, so a pair is never worse off for the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.quant.observers import Statistics, square
from pipelines.quant.stream import Workers
from pipelines.quant.w4a16.awq import Candidate
from pipelines.quant.w4a16.feedback import feedback, inverse_factor
from pipelines.quant.w4a16.rounding import GroupCodes, quantize_groups, round_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How linears become 4 bits: `feedback` rounds with error feedback, `clip` searches the ranges of groups,
    `exponents` are the scales to try, and `correction` is the part of the drift of the inputs that is made up for."""

    group_size: int
    symmetric: bool = False
    feedback: bool = True
    clip: bool = True
    correction: float = 0.0
    exponents: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The codes of each linear, for weights times the candidate's scale, and errors in parts of the outputs' power:
    of rounding to nearest alone, of the method without scaling, and of what was chosen."""

    candidate: Candidate
    codes: list[GroupCodes]
    rounded_error: float
    unscaled_error: float
    error: float

    def report(self) -> dict[str, Any]:
        return {
            "activation_exponent": self.candidate.x,
            "weight_exponent": self.candidate.y,
            "error_rounded": self.rounded_error,
            "error_unscaled": self.unscaled_error,
            "error": self.error,
        }


def quantize_linears(
    weights: Sequence[Tensor], seen: Statistics, candidates: Sequence[Candidate], method: Method, workers: Workers
) -> Chosen:
    """Quantize float32 weights [out, in] that read one input, of which `seen` has `gram`, `tokens` and maybe `drift`.

    The first of `candidates` is no scaling. Ranges are searched for it and for the best of the others alone; the better
    of the two is kept, and no scaling where they are equal.
    """
    gram = seen["gram"] / seen["tokens"]
    factor = inverse_factor(gram) if method.feedback or method.correction else None
    wanted = torch.cat(list(weights))
    power = _error(wanted, gram) or 1.0
    rounded = _error(round_groups(wanted, method.group_size, symmetric=method.symmetric).sub_(wanted), gram)
    if method.correction:
        assert factor is not None
        moved = (wanted @ (seen["drift"] / seen["tokens"])) @ factor.t() @ factor
        wanted = wanted + method.correction * moved

    def quantized(candidate: Candidate, clip: bool) -> tuple[float, GroupCodes]:
        scaled = wanted * candidate.scale
        if method.feedback:
            assert factor is not None
            codes, error = feedback(
                scaled, factor * candidate.scale, method.group_size, symmetric=method.symmetric, clip=clip
            )
            return error, codes
        metric = gram / candidate.scale / candidate.scale.unsqueeze(-1) if clip else None
        codes = quantize_groups(scaled, method.group_size, symmetric=method.symmetric, gram=metric)
        return _error(codes.dequantize() / candidate.scale - wanted, gram), codes

    best = 0
    if len(candidates) > 1:
        errors = list(workers.in_order(lambda index: quantized(candidates[index], False)[0], len(candidates)))
        best = min(range(len(errors)), key=errors.__getitem__)
    finalists = [candidates[index] for index in dict.fromkeys((0, best))]
    results = list(workers.in_order(lambda index: quantized(finalists[index], method.clip), len(finalists)))
    final = min(range(len(results)), key=lambda index: results[index][0])
    return Chosen(
        candidate=finalists[final],
        codes=results[final][1].rows([len(weight) for weight in weights]),
        rounded_error=rounded / power,
        unscaled_error=results[0][0] / power,
        error=results[final][0] / power,
    )


def _error(difference: Tensor, gram: Tensor) -> float:
    """trace(d G d^T): what a difference of the weights is in the outputs, summed over them."""
    if difference.is_cuda:
        return float(((difference @ gram) * difference).sum())
    return float(torch.dot(square(difference).view(-1), gram.reshape(-1)))  # the sum over d^T d * G: half the products
