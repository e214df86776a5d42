"""The least time that a step can take: its bytes at the speed of a copy, or its products at that of a matmul.

    seconds = max((weight bytes + sequences * context * KV bytes a token) / copy, 2 * tokens * parameters / matmul)

Weights are the linears and the output matrix, in the form in which the recipe keeps them: int4 with a scale and a zero
point (4 bytes together) a group, what is not quantized in the computing type. Activations, norms and embeddings, less
than a hundredth, are left out. A run's floor is the sum over its steps, each with the context that it really has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.ceilings import Ceilings
from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.models.cache import page_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step moves and multiplies: bytes of all weights, parameters that every token meets, KV bytes a token."""

    weight_bytes: int
    parameters: int
    kv_bytes: int


def cost(config: ModelConfig, recipe: Recipe, dtype: torch.dtype, *, devices: int = 1) -> Cost:
    """The cost of a model, of which each of `devices` has an equal part; the embedding counts as the output matrix
    alone."""
    shapes = names.model_tensors(config)
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != names.EMBEDDING}
    linears = sum(count for name, count in matrices.items() if name != names.HEAD)
    head = matrices[names.HEAD]
    bytes_of = {
        "fp16": linears * dtype.itemsize,
        "w8a8": linears,
        "w4a16": linears // 2 + linears // max(recipe.group_size, 1) * 4,
    }
    head_bytes = {
        "fp16": head * dtype.itemsize,
        "int8": head,
        "int4": head // 2 + head // max(recipe.group_size, 1) * 4,
    }
    return Cost(
        weight_bytes=(bytes_of[recipe.weights] + head_bytes[recipe.head]) // devices,
        parameters=(linears + head) // devices,
        kv_bytes=page_bytes(
            config,
            page_len=1,
            dtype=dtype,
            quantized=recipe.kv == "kv8",
            per_token=recipe.kv_granularity == "token",
        )
        // devices,
    )


def step_seconds(of: Cost, ceilings: Ceilings, *, tokens: int, context: int) -> float:
    """A step of `tokens` tokens whose sequences have `context` cached tokens together."""
    read = of.weight_bytes + context * of.kv_bytes
    return max(read / ceilings.copy, 2 * tokens * of.parameters / ceilings.matmul)


def generation_seconds(of: Cost, ceilings: Ceilings, *, batch: int, inputs: int, outputs: int) -> float:
    """`batch` prompts of `inputs` tokens in one step, which gives the first tokens, and a step for each further one."""
    total = step_seconds(of, ceilings, tokens=batch * inputs, context=batch * inputs)
    for context in range(inputs + 1, inputs + outputs):
        total += step_seconds(of, ceilings, tokens=batch, context=batch * context)
    return total


def prefill_operations(config: ModelConfig, of: Cost, *, batch: int, inputs: int) -> int:
    """What computing `batch` prompts multiplies and adds: two a parameter and token, the output matrix for the last
    token of each prompt alone, and attention over the half of all pairs that is causal."""
    head = config.vocab_size * config.hidden_size
    pairs = inputs * (inputs + 1) // 2
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    return batch * (2 * inputs * (of.parameters - head) + 2 * head + attention)


def throughput_seconds(of: Cost, ceilings: Ceilings, requests: Sequence[tuple[int, int]], *, at_once: int) -> float:
    """Requests of (inputs, outputs), `at_once` of them in every step: their products, or their reading, in full steps.

    Every KV byte is read once a token, the weights once a step, of which there are at least tokens / at_once and at
    least as many as the longest answer has tokens.
    """
    products = 2 * sum(inputs + outputs for inputs, outputs in requests) * of.parameters / ceilings.matmul
    steps = max(math.ceil(sum(outputs for _, outputs in requests) / at_once), max(outputs for _, outputs in requests))
    contexts = sum(outputs * inputs + outputs * (outputs + 1) // 2 for inputs, outputs in requests)
    return max(products, (steps * of.weight_bytes + contexts * of.kv_bytes) / ceilings.copy)
