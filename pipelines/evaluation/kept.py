"""What a baseline keeps for every later evaluation: `scores.safetensors` and `questions.json` in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.storage.artifacts import canonical_json
from pipelines.evaluation.answers import Answer
from pipelines.evaluation.texts import Item, Question, items_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What was asked, and what the checkpoint said.

    `losses` float32 [N] per scored token; `logprobs`, `ids`, `rest` as `divergence.BaseDistribution` has them;
    `answers` are the greedy answers to `questions`; `weight_bytes` is the size of the checkpoint's weight files, and
    `weights` what they are: fp16, or w4a16 where the checkpoint is quantized and nothing else is there to compare with.
    """

    items: Sequence[Item]
    questions: Sequence[Question]
    answers: Sequence[Answer]
    losses: Tensor
    logprobs: Tensor
    ids: Tensor
    rest: Tensor
    answer_tokens: int
    weight_bytes: int
    weights: str = "fp16"

    @property
    def digest(self) -> str:
        """SHA-256 over everything that was asked."""
        return items_digest(self.items, self.questions)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that an engine must hold to be asked the same."""
        asked = [len(question.prompt_ids) + self.answer_tokens for question in self.questions]
        return max([len(item.token_ids) for item in self.items] + asked)


def write_baseline(folder: Path, baseline: Baseline) -> None:
    """Write `baseline` into `folder`; equal baselines give equal bytes."""
    items = baseline.items
    tensors = {
        "losses": baseline.losses.float(),
        "logprobs": baseline.logprobs,
        "ids": baseline.ids,
        "rest": baseline.rest,
        "item_token_ids": torch.tensor([token for item in items for token in item.token_ids], dtype=torch.int32),
        "item_lengths": torch.tensor([len(item.token_ids) for item in items], dtype=torch.int32),
        "item_first_scored": torch.tensor([item.first_scored for item in items], dtype=torch.int32),
    }
    save_file(tensors, folder / "scores.safetensors")
    content = {
        "items": baseline.digest,
        "answer_tokens": baseline.answer_tokens,
        "weight_bytes": baseline.weight_bytes,
        "weights": baseline.weights,
        "questions": [
            {
                "prompt": question.prompt,
                "prompt_ids": list(question.prompt_ids),
                "answer": question.answer,
                "base_answer": answer.text,
                "base_answer_ids": list(answer.token_ids),
                "base_right": answer.right,
            }
            for question, answer in zip(baseline.questions, baseline.answers, strict=True)
        ],
    }
    (folder / "questions.json").write_bytes(canonical_json(content))


def read_baseline(folder: Path) -> Baseline:
    """Read what `write_baseline` wrote. ValueError when the two files do not belong together."""
    tensors = load_file(folder / "scores.safetensors")
    content = json.loads((folder / "questions.json").read_bytes())
    ids = iter(tensors["item_token_ids"].tolist())
    shapes = zip(tensors["item_lengths"].tolist(), tensors["item_first_scored"].tolist(), strict=True)
    items = [Item(token_ids=tuple(next(ids) for _ in range(length)), first_scored=first) for length, first in shapes]
    rows = content["questions"]
    baseline = Baseline(
        items=items,
        questions=[
            Question(prompt=row["prompt"], prompt_ids=tuple(row["prompt_ids"]), answer=row["answer"]) for row in rows
        ],
        answers=[
            Answer(token_ids=tuple(row["base_answer_ids"]), text=row["base_answer"], right=row["base_right"])
            for row in rows
        ],
        losses=tensors["losses"],
        logprobs=tensors["logprobs"],
        ids=tensors["ids"],
        rest=tensors["rest"],
        answer_tokens=content["answer_tokens"],
        weight_bytes=content["weight_bytes"],
        weights=content["weights"],
    )
    if baseline.digest != content["items"] or len(baseline.losses) != sum(item.num_scored for item in items):
        raise ValueError(f"{folder} holds files of two different baselines. Remove it and run `dvc repro` again.")
    return baseline
