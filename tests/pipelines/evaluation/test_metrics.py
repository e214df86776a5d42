import math

import pytest
import torch

from pipelines.evaluation.answers import Answer
from pipelines.evaluation.kept import Baseline
from pipelines.evaluation.metrics import Candidate, estimates
from pipelines.evaluation.texts import Item, Question

ITEMS = [Item(token_ids=tuple(range(6)), first_scored=1), Item(token_ids=tuple(range(4)), first_scored=1)]


def _baseline(*, questions: int) -> Baseline:
    return Baseline(
        items=ITEMS,
        questions=[Question(prompt="q", prompt_ids=(1,), answer="a")] * questions,
        answers=[Answer(token_ids=(1,), text="a", right=True)] * questions,
        losses=torch.full((8,), 2.0),
        logprobs=torch.zeros(8, 4),
        ids=torch.zeros(8, 4, dtype=torch.uint16),
        rest=torch.zeros(8),
        answer_tokens=2,
        weight_bytes=1,
    )


def test_metrics_are_over_all_scored_tokens() -> None:
    kl = torch.tensor([0.1] * 5 + [0.5] * 3, dtype=torch.float64)
    candidate = Candidate(
        losses=torch.full((8,), 2.5, dtype=torch.float64),
        kl=kl,
        agrees=torch.tensor([True] * 6 + [False] * 2),
        answers=[Answer(token_ids=(1,), text="b", right=False)] * 2,
    )
    found = estimates(candidate, _baseline(questions=2), confidence=0.95)
    assert found["perplexity_base"].value == pytest.approx(math.exp(2.0))
    assert found["perplexity"].value == pytest.approx(math.exp(2.5))
    assert found["perplexity_ratio"].value == pytest.approx(math.exp(0.5))
    assert found["kl_mean"].value == pytest.approx((0.5 + 1.5) / 8)
    assert found["kl_p99"].value == 0.5
    assert found["top1_agreement"].value == 0.75
    assert found["answer_flips"].value == 1.0


def test_without_questions_flips_are_not_measured() -> None:
    candidate = Candidate(
        losses=torch.zeros(8, dtype=torch.float64),
        kl=torch.zeros(8, dtype=torch.float64),
        agrees=torch.ones(8, dtype=torch.bool),
        answers=[],
    )
    assert "answer_flips" not in estimates(candidate, _baseline(questions=0), confidence=0.95)
