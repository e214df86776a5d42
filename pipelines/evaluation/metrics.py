"""From what a candidate said to metrics with intervals, paired with the baseline item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.runtime.engine import Engine
from pipelines.evaluation.answers import Answer, Flips, count_flips, greedy_answers
from pipelines.evaluation.divergence import Divergence
from pipelines.evaluation.kept import Baseline
from pipelines.evaluation.perplexity import Scoring, TokenLoss, perplexity, perplexity_ratio, sums_by_item
from pipelines.evaluation.statistics import Estimate, mean_over_items, share_over_items, upper_quantile


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a candidate said to a baseline's items and questions, per scored token and per question."""

    losses: Tensor
    kl: Tensor
    agrees: Tensor
    answers: Sequence[Answer]


def ask(engine: Engine, baseline: Baseline) -> Candidate:
    """Ask the engine everything that the baseline was asked."""
    num_tokens = sum(item.num_scored for item in baseline.items)
    losses = TokenLoss(num_tokens)
    divergence = Divergence(baseline.logprobs, baseline.ids, baseline.rest)
    scoring = Scoring(baseline.items, [losses, divergence])
    engine.score([list(item.token_ids) for item in baseline.items], scoring.on_logits)
    scoring.finish()
    answers = greedy_answers(engine, baseline.questions, max_new_tokens=baseline.answer_tokens)
    return Candidate(losses=losses.values, kl=divergence.kl, agrees=divergence.agrees, answers=answers)


def estimates(candidate: Candidate, baseline: Baseline, *, confidence: float) -> dict[str, Estimate]:
    """Every metric that a gate can bound, by name. `answer_flips` is there when the set has questions.

    Perplexity, KL and agreement are over all scored tokens, of texts and of right answers alike.
    """
    counts = [item.num_scored for item in baseline.items]
    base = baseline.losses.double()
    agreeing = [round(total) for total in sums_by_item(candidate.agrees, counts)]
    found = {
        "perplexity_base": perplexity(base, counts, confidence=confidence),
        "perplexity": perplexity(candidate.losses, counts, confidence=confidence),
        "perplexity_ratio": perplexity_ratio(candidate.losses, base, counts, confidence=confidence),
        "kl_mean": mean_over_items(sums_by_item(candidate.kl, counts), counts, confidence=confidence),
        "kl_p99": upper_quantile(candidate.kl.tolist(), 0.99, confidence=confidence),
        "top1_agreement": share_over_items(agreeing, counts, confidence=confidence),
    }
    if baseline.questions:
        found["answer_flips"] = flips(candidate, baseline).rate(confidence=confidence)
    return found


def flips(candidate: Candidate, baseline: Baseline) -> Flips:
    """How the candidate's answers differ from the base's in rightness."""
    return count_flips(baseline.answers, candidate.answers)
