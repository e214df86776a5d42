"""Greedy answers to questions, and how rightness differs between two models that were asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Sampling
from engine.runtime.engine import Engine
from pipelines.evaluation.statistics import Estimate, share
from pipelines.evaluation.texts import Question, is_right


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A greedy answer: its ids (with the end token, if it came), its text, and whether it is the expected one."""

    token_ids: tuple[int, ...]
    text: str
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Questions by what became of them: in base and candidate right, and in which direction the others went."""

    num_questions: int
    base_right: int
    candidate_right: int
    right_to_wrong: int
    wrong_to_right: int

    def rate(self, *, confidence: float) -> Estimate:
        """The share of questions whose rightness changed, either way: two changes that cancel out are still two."""
        return share(self.right_to_wrong + self.wrong_to_right, self.num_questions, confidence=confidence)


def greedy_answers(engine: Engine, questions: Sequence[Question], *, max_new_tokens: int) -> list[Answer]:
    """The engine's greedy answer to every question, at most `max_new_tokens` tokens each."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    completions = engine.generate([list(question.prompt_ids) for question in questions], sampling)
    return [
        Answer(token_ids=done.token_ids, text=done.text, right=is_right(done.text, question.answer))
        for question, done in zip(questions, completions, strict=True)
    ]


def count_flips(base: Sequence[Answer], candidate: Sequence[Answer]) -> Flips:
    """Compare the answers to the same questions."""
    pairs = [(b.right, c.right) for b, c in zip(base, candidate, strict=True)]
    return Flips(
        num_questions=len(pairs),
        base_right=sum(b for b, _ in pairs),
        candidate_right=sum(c for _, c in pairs),
        right_to_wrong=sum(b and not c for b, c in pairs),
        wrong_to_right=sum(c and not b for b, c in pairs),
    )
