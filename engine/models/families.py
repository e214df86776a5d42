"""Which checkpoints the one decoder computes: a row per architecture, and config.json -> ModelConfig. No torch.

Every field of config.json is one of three: it is read here, it must have a value under which it changes nothing, or it
is known to change nothing. Any other field is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from engine.config import Dtype, ModelConfig
from engine.models import layouts
from engine.models.config_fields import DEFAULTS, HARMLESS, NEUTRAL, READ
from engine.models.layouts import Layout
from engine.models.rope_scaling import check_rope, read_rope, refused
from engine.wording import cut, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: what we call it, how it stores tensors, and how its config.json differs from Llama's.

    - `renamed`: Llama's name of a field -> the name here. A field that goes by Llama's name all the same is not read.
    - `defaults`: what the architecture takes where config.json is silent.
    - `allowed`: further fields, and the values under which the decoder computes the same.
    - `qkv_bias`, `o_bias`: always, never, or the name of the field that says so.
    - `needed`: fields without which this is another model, and why.
    """

    name: str
    layout: Layout = layouts.HUGGING_FACE
    renamed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    qk_norm: bool = False
    sliding_window: bool = False
    intermediate_parts: int = 1
    needed: Mapping[str, str] = field(default_factory=dict)


_QWEN_WINDOW = {"use_sliding_window": (False,), "sliding_window": (None, int), "max_window_layers": (None, int)}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        name="llama", qkv_bias="attention_bias", o_bias="attention_bias", allowed={"mlp_bias": (False,)}
    ),
    "MistralForCausalLM": Family(
        name="mistral",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        sliding_window=True,
    ),
    "InternLMForCausalLM": Family(name="internlm", defaults={"bias": True}, qkv_bias="bias", o_bias="bias"),
    "InternLM2ForCausalLM": Family(
        name="internlm2", layout=layouts.INTERNLM2, defaults={"bias": True}, qkv_bias="bias", o_bias="bias"
    ),
    "InternLM3ForCausalLM": Family(
        name="internlm3",
        defaults={"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768},
        qkv_bias="qkv_bias",
        allowed={"bias": (False,), "mlp_bias": (False,), "attention_bias": (False,)},
    ),
    "QWenLMHeadModel": Family(
        name="qwen",
        layout=layouts.QWEN,
        renamed={
            "rms_norm_eps": "layer_norm_epsilon",
            "max_position_embeddings": "seq_length",
            "rope_theta": "rotary_emb_base",
            "head_dim": "kv_channels",
            "logn": "use_logn_attn",
        },
        defaults={"use_logn_attn": True, "use_dynamic_ntk": True},
        allowed={
            "no_bias": (True,),
            "rotary_pct": (1,),
            "scale_attn_weights": (True,),
            "use_cache_quantization": (False,),
        },
        qkv_bias=True,
        intermediate_parts=2,
    ),
    "Qwen2ForCausalLM": Family(
        name="qwen2", defaults={"max_position_embeddings": 32768}, qkv_bias=True, allowed=_QWEN_WINDOW
    ),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        defaults={"head_dim": 128, "max_position_embeddings": 32768},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        allowed=_QWEN_WINDOW,
    ),
    "BaiChuanForCausalLM": Family(name="baichuan", layout=layouts.BAICHUAN, defaults={"max_position_embeddings": 4096}),
    "BaichuanForCausalLM": Family(
        name="baichuan2",
        layout=layouts.BAICHUAN2,
        needed={
            "max_position_embeddings": "a Baichuan model without it has ALiBi attention (the models of 13B), which "
            "this engine does not compute; Baichuan-7B and Baichuan2-7B it does"
        },
    ),
}

# What config.ini and the reference's engine hold: 32 bits.
LARGEST = 2**31 - 1
DTYPES: dict[str, Dtype] = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The row of a config.json; ValueError names the architecture that there is none for."""
    architectures = hf_config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise refused("architectures", architectures, " or ".join(repr([known]) for known in FAMILIES))
    return FAMILIES[name]


def model_config(hf_config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The shape of the model that a config.json describes; end tokens of generation_config.json are added.

    ValueError names the field and the value that this decoder does not compute or know, or that is missing.
    """
    family = family_of(hf_config)
    for name, why in family.needed.items():
        if hf_config.get(name) is None:
            raise ValueError(f"config.json of {hf_config['architectures'][0]} has no {name}: {why}.")
    _check_known(hf_config, family)
    given = {**family.defaults, **hf_config}
    fields = {**DEFAULTS, **{name: value for name, value in given.items() if name not in family.renamed}}
    fields |= {ours: given[theirs] for ours, theirs in family.renamed.items() if theirs in given}
    hidden_size, num_heads = _count(fields, "hidden_size"), _count(fields, "num_attention_heads")
    num_kv_heads = num_heads if fields.get("num_key_value_heads") is None else _count(fields, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise refused("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    intermediate_size, parts = _count(fields, "intermediate_size"), family.intermediate_parts
    if intermediate_size % parts:
        raise refused("intermediate_size", intermediate_size, f"a multiple of {parts} for this architecture")
    trained = _count(fields, "max_position_embeddings")
    windowed = family.sliding_window and fields.get("sliding_window") is not None
    window = _count(fields, "sliding_window") if windowed else None
    types = fields.get("layer_types")
    if types is not None and (windowed or types != ["full_attention"] * _count(fields, "num_hidden_layers")):
        raise refused("layer_types", types, "'full_attention' in every layer, without a sliding_window")
    rope_theta, rope_scaling = read_rope(fields, trained=trained)
    config = ModelConfig(
        family=family.name,
        vocab_size=_count(fields, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_count(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads),
        intermediate_size=intermediate_size // parts,
        norm_eps=_positive(fields, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=trained,
        sliding_window=window,
        logn=_flag(fields, "logn"),
        qk_norm=family.qk_norm,
        qkv_bias=_bias(fields, family.qkv_bias),
        o_bias=_bias(fields, family.o_bias),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        dtype=_dtype(fields),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(hf_config, generation_config or {}),
    )
    try:
        check_rope(config)
    except ValueError as error:
        raise ValueError(f"config.json {error}") from error
    return config


def _check_known(hf_config: Mapping[str, Any], family: Family) -> None:
    biases = {name for name in (family.qkv_bias, family.o_bias) if isinstance(name, str)}
    read = READ | biases | set(family.renamed.values()) | set(family.defaults)
    if family.sliding_window:
        read |= {"sliding_window"}
    if family.name == "internlm":
        read |= {"rotary"}
    for name, value in hf_config.items():
        allowed = family.allowed.get(name, NEUTRAL.get(name))
        if name in read and name not in family.allowed:
            continue
        if allowed is None:
            if name not in HARMLESS:
                raise ValueError(
                    f"config.json has {cut(name)} = {shown(value)}, a field that this engine does not know for "
                    f"{hf_config['architectures'][0]}: it may change the numbers. Take it out if it does not."
                )
        elif value not in allowed and not (int in allowed and isinstance(value, int)):
            listed = " or ".join("a number" if one is int else repr(one) for one in allowed)
            raise refused(name, value, listed)


def _head_dim(fields: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = _count(fields, "head_dim")
    elif hidden_size % num_heads:
        raise refused("num_attention_heads", num_heads, f"a divisor of hidden_size = {hidden_size}, or a head_dim")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise refused("head_dim", head_dim, "an even number: rotary embedding turns pairs")
    return head_dim


def _bias(fields: Mapping[str, Any], rule: bool | str) -> bool:
    return _flag(fields, rule) if isinstance(rule, str) else rule


def _dtype(fields: Mapping[str, Any]) -> Dtype:
    names = {str(fields[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if fields.get(key) is not None}
    if not names:
        return "float32"
    if len(names) > 1:
        raise ValueError(
            f"config.json gives more than one type of the weights: {shown(sorted(names))}; keep one of them"
        )
    name = names.pop()
    if name not in DTYPES:
        raise refused("dtype", name, " or ".join(DTYPES))
    return DTYPES[name]


def _bos(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("bos_token_id")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or _is_token(value):
        return value
    raise refused("bos_token_id", value, "one number or null")


def _eos(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of all configs in order of appearance, each once."""
    found: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if _is_token(token):
                found[token] = None
            elif token is not None:
                raise refused("eos_token_id", value, "a number, a list of numbers or null")
    return tuple(found)


def _is_token(value: object) -> TypeGuard[int]:
    """Whether a value is a token id; -1 is written for none by some."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= LARGEST


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise refused(name, value, f"a whole number from 1 on, up to {LARGEST}")
    return value


def _positive(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise refused(name, value, "a positive number")
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise refused(name, value, "true or false")
    return bool(value)
