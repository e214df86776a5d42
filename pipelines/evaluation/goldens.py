"""The goldens of an evaluation: some of its own prompts, as the evaluated artifact answers them on this device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from engine.config import Recipe
from engine.models.cache import KVScales, PerToken
from engine.models.decoder import Decoder
from engine.runtime import selftest
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from pipelines.evaluation.kept import Baseline

FORMAT = 1
NUM_PROMPTS = 4
NUM_TOKENS = 16
BEGINNING = 32

T = TypeVar("T")


def choose_prompts(baseline: Baseline, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """NUM_PROMPTS prompts, spread over the set: rendered text and ids of questions, else the beginnings of items
    (at most their first half)."""
    if baseline.questions:
        return {question.prompt: list(question.prompt_ids) for question in _spread(baseline.questions)}
    beginnings = [
        list(item.token_ids[: min(BEGINNING, -(-len(item.token_ids) // 2))]) for item in _spread(baseline.items)
    ]
    return {tokenizer.decode(ids, skip_special=False): ids for ids in beginnings}


def record_goldens(
    engine: Engine,
    model: Decoder,
    kv_scales: KVScales | PerToken | None,
    prompts: dict[str, list[int]],
    *,
    artifact: str,
    recipe: Recipe,
    device_class: str,
) -> dict[str, Any]:
    """The content of goldens.json: what `selftest.replay` needs, and which artifact and device class it is of."""
    return {
        "format": FORMAT,
        "artifact": artifact,
        "device_class": device_class,
        "tolerance": selftest.tolerance_of(recipe),
        "prompts": selftest.record(engine, model, kv_scales, prompts, num_tokens=NUM_TOKENS),
    }


def _spread(values: Sequence[T]) -> list[T]:
    count = min(NUM_PROMPTS, len(values))
    return [values[i * len(values) // count] for i in range(count)]
