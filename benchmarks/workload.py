"""What is asked of an engine: requests with prompts of token ids and a fixed number of new tokens. Torch-free.

A workload depends on its arguments alone (numpy's PCG64 from a seed), so every engine answers the same one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Log-normal lengths: round(exp(log(median) + deviation * N(0, 1))), cut to 4 .. 1024. The means are 240 and 229, those
# of ShareGPT conversations in Llama's tokens.
INPUT_MEDIAN, INPUT_DEVIATION = 147.2, 1.1
OUTPUT_MEDIAN, OUTPUT_DEVIATION = 149.1, 1.0
SHORTEST, LONGEST = 4, 1024
# Prompts do not begin with a special token; random ones are drawn from what follows these.
FIRST_ID = 3


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens are generated whatever they are."""

    prompt_ids: list[int]
    new_tokens: int

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + self.new_tokens


def fixed(count: int, inputs: int, outputs: int, *, vocab_size: int, seed: int) -> list[Request]:
    """`count` requests of `inputs` random tokens in and `outputs` out."""
    draw = np.random.default_rng(seed)
    return [Request(_prompt(draw, inputs, vocab_size), outputs) for _ in range(count)]


def log_normal(count: int, *, vocab_size: int, seed: int) -> list[Request]:
    """`count` requests of random tokens with lengths like those of conversations, see above."""
    draw = np.random.default_rng(seed)
    inputs = _lengths(draw, count, INPUT_MEDIAN, INPUT_DEVIATION)
    outputs = _lengths(draw, count, OUTPUT_MEDIAN, OUTPUT_DEVIATION)
    return [Request(_prompt(draw, i, vocab_size), o) for i, o in zip(inputs, outputs, strict=True)]


def share_gpt(path: Path, encode: Callable[[str], list[int]], count: int, *, seed: int) -> list[Request]:
    """`count` conversations, drawn with `seed`, of a file in ShareGPT's format: their first question and the length of
    the first answer.

    Those below 4 tokens on a side, above 1024 in or 2048 together are passed over, as vLLM's benchmark does. ValueError
    for a file of another form, or with fewer conversations than `count`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = [
            (talk["conversations"][0]["value"], talk["conversations"][1]["value"])
            for talk in content
            if len(talk["conversations"]) >= 2
        ]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{path} is not in ShareGPT's format: a JSON list of objects, each with a list `conversations` of objects "
            f"with a text `value` ({type(error).__name__}: {error})."
        ) from error
    found: list[Request] = []
    for index in np.random.default_rng(seed).permutation(len(pairs)):
        if len(found) == count:
            break
        question, answer = pairs[index]
        request = Request(encode(question), len(encode(answer)))
        if SHORTEST <= len(request.prompt_ids) <= LONGEST and request.new_tokens >= SHORTEST and request.total <= 2048:
            found.append(request)
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} conversations that fit, but requests={count}: ask for fewer.")
    return found


def arrivals(count: int, rate: float, *, seed: int) -> list[float]:
    """Seconds at which requests come: a Poisson process of `rate` a second, from 0; all at once for rate 0."""
    if not rate:
        return [0.0] * count
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(at) for at in np.cumsum(gaps) - gaps[0]]


def longest(requests: Sequence[Request]) -> int:
    """Tokens of the longest request, in and out: the session_len that they need."""
    return max(request.total for request in requests)


def _lengths(draw: np.random.Generator, count: int, median: float, deviation: float) -> list[int]:
    values = np.exp(np.log(median) + deviation * draw.standard_normal(count))
    return [int(value) for value in np.clip(np.rint(values), SHORTEST, LONGEST)]


def _prompt(draw: np.random.Generator, length: int, vocab_size: int) -> list[int]:
    return [int(token) for token in draw.integers(FIRST_ID, vocab_size, length)]
