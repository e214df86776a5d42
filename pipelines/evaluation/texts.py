"""What an evaluation set asks: token sequences with the part of them that is scored, and questions with answers.

Two protocols cut a text. `windows` is the field's for wikitext-2 (GPTQ's): all documents joined by a blank line,
tokenized once, cut into windows of equal length without overlap, the rest dropped. `documents` keeps each document
by itself: BOS, then its tokens, cut to a length. In both every token but an item's first is scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class TextTokenizer(Protocol):
    """What is needed of `engine.runtime.tokenizer.Tokenizer`."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """`token_ids` are read; those from `first_scored` (at least 1) on are scored, each given all that come before."""

    token_ids: tuple[int, ...]
    first_scored: int

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.first_scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A rendered prompt, its ids, and the right answer."""

    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str


def document_items(texts: Iterable[str], tokenizer: TextTokenizer, *, length: int, max_tokens: int) -> list[Item]:
    """One item for each document, in order: BOS (where the model has one) and tokens, at most `length` of them.

    Stops before the item with which more than `max_tokens` tokens would be read; documents too short to score are left
    out. ValueError when nothing is left.
    """
    items: list[Item] = []
    budget = max_tokens
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for text in texts:
        ids = (start + tokenizer.encode(text.strip(), add_special=False))[:length]
        if len(ids) < 2:
            continue
        budget -= len(ids)
        if budget < 0:
            break
        items.append(Item(token_ids=tuple(ids), first_scored=1))
    return _some(items, f"no document of at least two tokens fits into max_tokens={max_tokens}")


def window_items(texts: Iterable[str], tokenizer: TextTokenizer, *, length: int, max_tokens: int) -> list[Item]:
    """Windows of exactly `length` tokens over all documents joined, at most `max_tokens` tokens of them.

    ValueError when the text is shorter than one window or the budget smaller.
    """
    ids = tokenizer.encode("\n\n".join(texts))
    count = min(len(ids), max_tokens) // length
    items = [Item(token_ids=tuple(ids[i * length : (i + 1) * length]), first_scored=1) for i in range(count)]
    return _some(items, f"{len(ids)} tokens of text and max_tokens={max_tokens} make no window of {length} tokens")


def read_questions(path: Path, tokenizer: TextTokenizer) -> list[Question]:
    """The questions of a .jsonl file, a line each: {"messages": [...] or "prompt": "...", "answer": "..."}.

    Messages are rendered by the chat template up to where the answer begins; a prompt is taken as it is.
    """
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            questions.append(_question(line, tokenizer, where=f"{path}, line {number}"))
    if not questions:
        raise ValueError(f'{path} holds no question: a line of it is {{"messages": [...], "answer": "..."}}.')
    return questions


def answer_items(questions: Iterable[Question], tokenizer: TextTokenizer, *, max_answer_tokens: int) -> list[Item]:
    """Prompt and right answer of every question; only the answer's tokens, at most `max_answer_tokens`, are scored."""
    items: list[Item] = []
    for question in questions:
        answer = tokenizer.encode(question.answer, add_special=False)[:max_answer_tokens]
        items.append(Item(token_ids=question.prompt_ids + tuple(answer), first_scored=len(question.prompt_ids)))
    return items


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one: equal but for case, outer white space and a full stop at the end."""
    return _plain(answer) == _plain(expected)


def items_digest(items: Sequence[Item], questions: Sequence[Question]) -> str:
    """SHA-256 over everything that is asked: two evaluations with the same digest are paired item by item."""
    content = [
        [[list(item.token_ids), item.first_scored] for item in items],
        [[question.prompt, list(question.prompt_ids), question.answer] for question in questions],
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _question(line: str, tokenizer: TextTokenizer, *, where: str) -> Question:
    try:
        row = json.loads(line)
        answer = row["answer"]
        if "messages" in row:
            prompt = tokenizer.chat(row["messages"])
            prompt_ids = tokenizer.encode(prompt, add_special=False)
        else:
            prompt = row["prompt"]
            prompt_ids = tokenizer.encode(prompt)
        if not isinstance(answer, str) or not answer.strip():
            raise TypeError("the answer is not a text")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'{where} is not a question ({error}): a line is {{"messages": [{{"role": ..., "content": ...}}, ...],'
            ' "answer": "..."}, or has a "prompt" in place of the messages.'
        ) from error
    return Question(prompt=prompt, prompt_ids=tuple(prompt_ids), answer=answer)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def _some(items: list[Item], why: str) -> list[Item]:
    if not items:
        raise ValueError(f"The evaluation set is empty: {why}. Give a longer text, or change the evaluation's lengths.")
    return items
