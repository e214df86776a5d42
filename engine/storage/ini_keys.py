"""The keys of config.ini: their types, defaults and ranges, and which of them can be set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from engine.cache_size import is_cache_size
from engine.storage.ingot_section import IngotSection

Value = int | float | str
WEIGHT_TYPES = ("fp16", "bf16", "int4", "int8")
KV_INT8 = 4
# The reference's engine reads 32 bits.
LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IniConfig:
    """One field per key of the section `[llama]`, in file order.

    `start_id` and `end_id` are -1 where the model has none. The last three keys are read by the
    reference's engine but written by no converter: None is "not in the file". `ingot` is the section of that name.
    """

    model_name: str
    tensor_para_size: int
    head_num: int
    kv_head_num: int
    vocab_size: int
    num_layer: int
    inter_size: int
    norm_eps: float
    attn_bias: int
    start_id: int
    end_id: int
    session_len: int
    weight_type: str
    rotary_embedding: int
    rope_theta: float
    size_per_head: int
    group_size: int = 0
    max_batch_size: int = 64
    max_context_token_num: int = 1
    step_length: int = 1
    cache_max_entry_count: float = 0.5
    cache_block_seq_len: int = 128
    cache_chunk_size: int = 1
    use_context_fmha: int = 1
    quant_policy: int = 0
    max_position_embeddings: int = 0
    rope_scaling_factor: float = 0.0
    use_logn_attn: int = 0
    num_tokens_per_iter: int | None = None
    extra_tokens_per_iter: int | None = None
    max_prefill_iters: int | None = None
    ingot: IngotSection = field(default_factory=IngotSection)


KEYS = tuple(key.name for key in fields(IniConfig) if key.name != "ingot")


def _at_least(least: int) -> tuple[Callable[[Value], bool], str]:
    return lambda value: isinstance(value, int | float) and value >= least, f"at least {least}"


def _one_of(*allowed: Value) -> tuple[Callable[[Value], bool], str]:
    return lambda value: value in allowed, " or ".join(str(value) for value in allowed)


_POSITIVE = (lambda value: isinstance(value, int | float) and value > 0, "above 0")

RANGES: Mapping[str, tuple[Callable[[Value], bool], str]] = {
    "model_name": (
        lambda value: isinstance(value, str) and value == value.strip() != "" and value.isprintable(),
        "one line of printable text that neither starts nor ends with a space",
    ),
    "tensor_para_size": (
        lambda value: isinstance(value, int) and value > 0 and value & (value - 1) == 0,
        "a power of two",
    ),
    **dict.fromkeys(("head_num", "kv_head_num", "vocab_size", "num_layer", "inter_size", "session_len"), _at_least(1)),
    **dict.fromkeys(("norm_eps", "rope_theta"), _POSITIVE),
    "cache_max_entry_count": (is_cache_size, "a share of memory below 1, or a whole number of pages from 1 on"),
    **dict.fromkeys(("attn_bias", "use_context_fmha", "use_logn_attn"), _one_of(0, 1)),
    **dict.fromkeys(("start_id", "end_id", "cache_chunk_size"), _at_least(-1)),
    "weight_type": _one_of(*WEIGHT_TYPES),
    **dict.fromkeys(
        ("rotary_embedding", "size_per_head"),
        (lambda value: isinstance(value, int) and value > 0 and value % 2 == 0, "an even number above 0"),
    ),
    **dict.fromkeys(
        (
            "group_size",
            "max_batch_size",
            "max_context_token_num",
            "max_position_embeddings",
            "rope_scaling_factor",
            "num_tokens_per_iter",
            "extra_tokens_per_iter",
            "max_prefill_iters",
        ),
        _at_least(0),
    ),
    "step_length": _one_of(1),
    "cache_block_seq_len": _at_least(1),
    "quant_policy": _one_of(0, KV_INT8),
}

# How a workspace is run; every other key says what the model and its files are.
RUNTIME_KEYS = (
    "max_batch_size",
    "max_context_token_num",
    "step_length",
    "cache_max_entry_count",
    "cache_block_seq_len",
    "cache_chunk_size",
    "use_context_fmha",
    "max_position_embeddings",
    "rope_scaling_factor",
    "use_logn_attn",
    "num_tokens_per_iter",
    "extra_tokens_per_iter",
    "max_prefill_iters",
)
# Of these, what the model computes with.
OF_THE_MODEL = ("max_position_embeddings", "rope_scaling_factor", "use_logn_attn")
