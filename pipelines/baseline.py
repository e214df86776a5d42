"""The stage `baseline`: what the unquantized checkpoint says to an evaluation set, through the engine that will serve.

Of a checkpoint that is quantized already (weights=as_is) there is no unquantized one here: it is its own baseline.
Written once per model and evaluation set: `scores.safetensors` and `questions.json` (pipelines/evaluation/kept.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint
from pipelines.chat_templates import open_tokenizer
from pipelines.data.texts import read_documents
from pipelines.evaluation import texts
from pipelines.evaluation.answers import greedy_answers
from pipelines.evaluation.divergence import BaseDistribution
from pipelines.evaluation.kept import Baseline, write_baseline
from pipelines.evaluation.perplexity import Scoring, TokenLoss
from pipelines.slices import Call, locate, output, run_stage
from pipelines.sources import pickled

WEIGHTS = (".safetensors", ".bin", ".pth")


def work(call: Call) -> None:
    record, evaluation = call.slice["model"], call.slice["evaluation"]
    checkpoint = Checkpoint(locate(record), allow_bin=pickled(record), allow_quantized=True)
    tokenizer = open_tokenizer(checkpoint.folder, call.slice.get("template"))
    items, questions = read_set(evaluation, tokenizer, positions=checkpoint.config.max_position_embeddings)
    baseline = ask_checkpoint(
        checkpoint.folder,
        tokenizer,
        items,
        questions,
        answer_tokens=evaluation["answer_tokens"],
        allow_bin=pickled(record),
    )
    with output(call.out) as target:
        write_baseline(target, baseline)


def read_set(
    evaluation: dict[str, Any], tokenizer: Tokenizer, *, positions: int
) -> tuple[list[texts.Item], list[texts.Question]]:
    """The items and questions of a slice's evaluation. ValueError where they do not fit the model's positions."""
    length, answer_tokens = evaluation["sequence_length"], evaluation["answer_tokens"]
    if length > positions:
        raise ValueError(
            f"evaluation.sequence_length={length} is longer than the {positions} positions of the model: "
            f"set it to at most {positions}."
        )
    documents = read_documents(evaluation["text"])
    items = texts.window_items(documents, tokenizer, length=length, max_tokens=evaluation["max_tokens"])
    if evaluation["questions"] is None:
        return items, []
    questions = texts.read_questions(locate(evaluation["questions"]), tokenizer)
    longest = max(len(question.prompt_ids) for question in questions)
    if longest + answer_tokens > positions:
        raise ValueError(
            f"A question has {longest} tokens and evaluation.answer_tokens={answer_tokens}, together more than the "
            f"{positions} positions of the model: leave that question out or allow fewer answer tokens."
        )
    return items + texts.answer_items(questions, tokenizer, max_answer_tokens=answer_tokens), questions


def ask_checkpoint(
    folder: Path,
    tokenizer: Tokenizer,
    items: list[texts.Item],
    questions: list[texts.Question],
    *,
    answer_tokens: int,
    allow_bin: bool = False,
) -> Baseline:
    """Score the items and answer the questions with the checkpoint as it lies, its KV cache as computed."""
    checkpoint = Checkpoint(folder, allow_bin=allow_bin, allow_quantized=True)
    model = Decoder(checkpoint.config, checkpoint.weights(), device="cpu", dtype=torch.float32)
    longest = max(len(item.token_ids) for item in items)
    session_len = max([longest] + [len(question.prompt_ids) + answer_tokens for question in questions])
    engine = Engine(model, tokenizer, EngineConfig(), session_len=session_len)
    num_tokens = sum(item.num_scored for item in items)
    losses, distribution = TokenLoss(num_tokens), BaseDistribution(num_tokens, model.config.vocab_size)
    scoring = Scoring(items, [losses, distribution])
    engine.score([list(item.token_ids) for item in items], scoring.on_logits)
    scoring.finish()
    return Baseline(
        items=items,
        questions=questions,
        answers=greedy_answers(engine, questions, max_new_tokens=answer_tokens),
        losses=losses.values.float(),
        logprobs=distribution.logprobs,
        ids=distribution.ids,
        rest=distribution.rest,
        answer_tokens=answer_tokens,
        weights=checkpoint.recipe.weights,
        weight_bytes=sum(path.stat().st_size for path in checkpoint.files if path.suffix in WEIGHTS),
    )


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
