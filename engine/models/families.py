"""Which checkpoints the one decoder computes: a row per architecture, and config.json -> ModelConfig.

A field that would change the numbers and is not computed here is refused by name; fields that cannot are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import Dtype, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture takes for granted where its config.json is silent; `name` is what we call it."""

    name: str
    defaults: Mapping[str, Any]
    attention_bias: bool


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(name="llama", defaults={}, attention_bias=True),
    "MistralForCausalLM": Family(
        name="mistral", defaults={"sliding_window": 4096, "num_key_value_heads": 8}, attention_bias=False
    ),
}

# Fields of these and neighbouring architectures that change the numbers, and the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_chunk_size": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "qk_layernorm": (None, False),
    "use_qk_norm": (None, False),
    "use_logn_attn": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
}
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
DTYPES: dict[str, Dtype] = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}


def model_config(hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The shape of the model that a config.json describes; end tokens of generation_config.json are added.

    ValueError names the field and the value that this decoder does not compute, or that is missing or impossible.
    """
    family = _family(hf_config)
    fields = {**DEFAULTS, **family.defaults, **hf_config}
    for name, allowed in NEUTRAL.items():
        if name in fields and fields[name] not in allowed:
            raise _refused(name, fields[name], " or ".join(repr(value) for value in allowed))
    layer_types = fields.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        raise _refused("layer_types", sorted(set(layer_types)), "'full_attention' in every layer")
    if not family.attention_bias and fields.get("attention_bias"):
        raise _refused("attention_bias", fields["attention_bias"], "False for this architecture")
    hidden_size, num_heads = _count(fields, "hidden_size"), _count(fields, "num_attention_heads")
    num_kv_heads = num_heads if fields.get("num_key_value_heads") is None else _count(fields, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise _refused("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    if fields.get("head_dim") is not None:
        head_dim = _count(fields, "head_dim")
    elif hidden_size % num_heads:
        raise _refused("num_attention_heads", num_heads, f"a divisor of hidden_size = {hidden_size}, or a head_dim")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise _refused("head_dim", head_dim, "an even number: rotary embedding turns pairs")
    return ModelConfig(
        family=family.name,
        vocab_size=_count(fields, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_count(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_count(fields, "intermediate_size"),
        norm_eps=_positive(fields, "rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=_count(fields, "max_position_embeddings"),
        attention_bias=_flag(fields, "attention_bias"),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        dtype=_dtype(fields),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(hf_config, generation_config or {}),
    )


def _family(hf_config: Mapping[str, Any]) -> Family:
    architectures = hf_config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise _refused("architectures", architectures, " or ".join(repr([name]) for name in FAMILIES))
    return FAMILIES[architectures[0]]


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """The base of the rotary embedding, from `rope_theta` or from `rope_parameters` (transformers 5)."""
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise _refused(name, given, "null or {'rope_type': 'default', ...}")
        kinds = {given[key] for key in ("rope_type", "type") if given.get(key) is not None}
        factor = given.get("partial_rotary_factor", 1.0)
        unknown = sorted(set(given) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if not kinds <= {"default"} or factor not in (None, 1.0) or unknown:
            raise _refused(name, dict(given), "null or {'rope_type': 'default', 'rope_theta': ...}")
        if given.get("rope_theta") is not None:
            found[name] = _positive(given, "rope_theta")
    if fields.get("rope_theta") is not None:
        found["rope_theta"] = _positive(fields, "rope_theta")
    if len(set(found.values())) > 1:
        raise ValueError(f"config.json gives more than one base of the rotary embedding: {found}; keep one of them")
    return next(iter(found.values()), 10000.0)


def _dtype(fields: Mapping[str, Any]) -> Dtype:
    names = {str(fields[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if fields.get(key) is not None}
    if not names:
        return "float32"
    if len(names) > 1:
        raise ValueError(f"config.json gives more than one type of the weights: {sorted(names)}; keep one of them")
    name = names.pop()
    if name not in DTYPES:
        raise _refused("dtype", name, " or ".join(DTYPES))
    return DTYPES[name]


def _bos(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("bos_token_id")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise _refused("bos_token_id", value, "one number or null")


def _eos(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of all configs in order of appearance, each once."""
    found: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool):
                found[token] = None
            elif token is not None:
                raise _refused("eos_token_id", value, "a number, a list of numbers or null")
    return tuple(found)


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refused(name, value, "a whole number from 1 on")
    return value


def _positive(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _refused(name, value, "a positive number")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _refused(name, value, "true or false")
    return bool(value)


def _refused(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(
        f"config.json has {name} = {value!r}, which this engine does not compute: it takes {allowed}. "
        f"Known architectures: {', '.join(FAMILIES)}."
    )
