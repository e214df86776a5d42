"""Tables of the rotary position embedding."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScaling
from engine.kernels import ops
from engine.models.batch import Batch
from engine.models.rope_scaling import is_dynamic, rope_base


class Rope(NamedTuple):
    """cos and sin, each [T, head_dim/2], and what queries are multiplied by, float32 [T], or None for 1."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None


def begin_step(config: ModelConfig, embedding: Tensor, batch: Batch) -> tuple[Tensor, Rope]:
    """Hidden states [T, hidden] before the first layer, and `rope_tables` in float32."""
    turned, factor = _turned(config, batch), _attention_factor(config)
    hidden, cos, sin = ops.begin_step(batch.token_ids, batch.drawn, embedding, batch.positions, turned, factor)
    return hidden, Rope(cos, sin, _logn(config, batch.positions))


def rope_tables(config: ModelConfig, batch: Batch, dtype: torch.dtype = torch.float32) -> Rope:
    """cos and sin of position * frequency for the pairs j < head_dim/2, in `dtype`; frequencies are of `frequencies`.

    Angles are float32, as models are trained with: at position 32768 they are up to 0.004 away from exact ones,
    and "better" ones would move logits away from every other implementation.
    """
    angles, factor = batch.positions.to(torch.float32)[:, None] * _turned(config, batch), _attention_factor(config)
    return Rope((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype), _logn(config, batch.positions))


def _turned(config: ModelConfig, batch: Batch) -> Tensor:
    """Frequencies [D/2], or [T, D/2] where they depend on the sequence."""
    bases = _bases(config, batch)
    if isinstance(bases, float):
        return _fixed_frequencies(config, batch.positions.device)
    return frequencies(config, bases, batch.positions.device)


def _attention_factor(config: ModelConfig) -> float:
    return config.rope_scaling.attention_factor if config.rope_scaling is not None else 1.0


@lru_cache(maxsize=64)
def _fixed_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Of a model whose base does not depend on the length: the same in every step."""
    with torch.inference_mode(False):
        return frequencies(config, config.rope_theta, device)


def frequencies(config: ModelConfig, base: Tensor | float, device: torch.device | str = "cpu") -> Tensor:
    """The angle per position of the pairs j < head_dim/2: base^(-2j/head_dim), scaled as the model says; [..., D/2].

    `base` is a number or a tensor [T, 1] on `device`. linear, llama3 and yarn have the formulas of Hugging Face.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    plain = 1.0 / (base**exponents)
    scaling = config.rope_scaling
    if scaling is None or is_dynamic(config):
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _kept_by_llama3(scaling, plain) if scaling.kind == "llama3" else _kept_by_yarn(scaling, config).to(device)
    return plain / scaling.factor * (1 - kept) + plain * kept


def _kept_by_llama3(scaling: RopeScaling, plain: Tensor) -> Tensor:
    """Share of each frequency that is kept: 1 for wavelengths that fit the original context `high_freq_factor` times
    and more, 0 for `low_freq_factor` times and fewer, and in a straight line between."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Share of each frequency that is kept: 1 for pairs that turn `beta_fast` times in the original context and more,
    0 for `beta_slow` times and fewer, and in a straight line over the pairs between (Peng et al. 2023)."""

    def pair_that_turns(times: float) -> float:
        original, log_base = scaling.original_max_position_embeddings, math.log(config.rope_theta)
        return config.head_dim * math.log(original / (times * 2 * math.pi)) / (2 * log_base)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    width = last - first or 0.001
    return 1 - ((torch.arange(config.head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def _bases(config: ModelConfig, batch: Batch) -> Tensor | float:
    """One base for all tokens, or float32 [T, 1] where it depends on the sequence."""
    if not is_dynamic(config):
        return float(config.rope_theta)
    bases = batch.rope_bases
    if bases is None:
        lengths = batch.context_lens.tolist()
        bases = torch.tensor([rope_base(config, length) for length in lengths], dtype=torch.float64)
    per_token = bases.to(batch.positions.device, torch.float32).repeat_interleave(
        batch.query_starts.diff(), output_size=len(batch.positions)
    )
    return per_token[:, None]


def _logn(config: ModelConfig, positions: Tensor) -> Tensor | None:
    """log(t) / log(P) for the t-th token beyond P = max_position_embeddings, 1 up to it (LMDeploy's use_logn_attn)."""
    if not config.logn:
        return None
    return ((positions.to(torch.float32) + 1).log() / math.log(config.max_position_embeddings)).clamp(min=1)
