"""What the engine is told: the shape of a model, how to run it, and how one request is sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a dense decoder, in one vocabulary for every family and every source.

    `vocab_size` is the number of rows of the embedding. `dtype` is what the source stores.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: Dtype = "float16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is quantized: weights and KV cache are two nouns, so that they compose."""

    weights: str = "fp16"
    kv: str = "kv16"
    group_size: int = 0

    def __str__(self) -> str:
        return self.weights if self.kv == "kv16" else f"{self.weights}-{self.kv}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run. Names and meanings are TurboMind's; the one deviation is said where it is.

    - `session_len`: most tokens of one sequence, prompt and answer; 0 = what the workspace says.
    - `max_batch_size`: most sequences in one step.
    - `num_tokens_per_iter`: token budget of one step (decode and prefill chunks together).
    - `cache_max_entry_count`: below 1 the share of FREE memory (v0.1.0: of total), from 1 on a number of pages.
    - `cache_block_seq_len`: tokens in a page.
    - `quant_policy`: 4 = int8 KV cache, 0 = not; None = what the workspace says.
    - `dtype`: computing type; `auto` is float32 on a CPU and the workspace's type on a GPU.
    """

    device: str = "cpu"
    dtype: Dtype | Literal["auto"] = "auto"
    session_len: int = 0
    max_batch_size: int = 64
    num_tokens_per_iter: int = 512
    cache_max_entry_count: float = 0.5
    cache_block_seq_len: int = 64
    quant_policy: int | None = None
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request is sampled. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `repetition_penalty` p divides a positive logit of every token seen so far by p and multiplies a
    negative one (Keskar et al. 2019, section 4.1). `seed` makes the answer repeatable whatever else runs.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    ignore_eos: bool = False
