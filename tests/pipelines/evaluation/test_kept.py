from pathlib import Path

import torch

from pipelines.evaluation.answers import Answer
from pipelines.evaluation.kept import Baseline, read_baseline, write_baseline
from pipelines.evaluation.texts import Item, Question

BASELINE = Baseline(
    items=[Item(token_ids=(5, 70_000, 7), first_scored=1), Item(token_ids=(1, 2, 3, 4), first_scored=3)],
    questions=[Question(prompt="q \u00e9", prompt_ids=(1, 2, 3), answer="a")],
    answers=[Answer(token_ids=(9, 2), text="b", right=False)],
    losses=torch.tensor([0.25, 1.5, 3.0]),
    logprobs=torch.randn(3, 64, generator=torch.Generator().manual_seed(1)),
    ids=torch.arange(192).view(3, 64).to(torch.uint16),
    rest=torch.tensor([-1.0, -torch.inf, -3.0]),
    answer_tokens=6,
    weight_bytes=123,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_baseline(tmp_path, BASELINE)
    found = read_baseline(tmp_path)
    for name in ("items", "questions", "answers", "answer_tokens", "weight_bytes", "digest"):
        assert getattr(found, name) == getattr(BASELINE, name), name
    for name in ("losses", "logprobs", "ids", "rest"):
        assert torch.equal(getattr(found, name), getattr(BASELINE, name)), name


def test_longest_counts_the_answers_that_are_to_come() -> None:
    assert BASELINE.longest == 3 + 6
