"""What config.json says about the rotary embedding, and the base that a sequence of a given length gets. No torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, cast

from engine.config import ModelConfig, RopeKind, RopeScaling
from engine.wording import cut, shown

# The kinds whose base depends on the length of the sequence.
DYNAMIC = ("dynamic", "qwen", "turbomind")
# Hugging Face's kinds: the numbers that each needs, and those that it may have.
HF_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
KIND_FIELDS = ("rope_type", "type")
NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
# Far beyond every model, and within what float32 holds after all formulas.
SMALLEST, LARGEST = 1e-6, 1e12


def is_dynamic(config: ModelConfig) -> bool:
    """Whether the base of a sequence depends on its length."""
    return config.rope_scaling is not None and config.rope_scaling.kind in DYNAMIC


def rope_base(config: ModelConfig, length: int) -> float:
    """The base of the rotary embedding for a sequence that may reach `length` tokens.

    With P = max_position_embeddings, s = factor and D = head_dim it is rope_theta * a^(D / (D - 2)), and a is
    - dynamic:    1 up to P, then s * length / P - (s - 1)       (Hugging Face, at the end of a whole prompt)
    - turbomind:  s up to P, then the same                       (LMDeploy v0.1.0, rope_scaling_factor)
    - qwen:       2^ceil(log2(length / P) + 1) - 1, at least 1   (Qwen v1, use_dynamic_ntk)
    """
    scaling, trained = config.rope_scaling, config.max_position_embeddings
    if scaling is None or scaling.kind not in DYNAMIC:
        return config.rope_theta
    if scaling.kind == "qwen":
        stretch = max(2.0 ** math.ceil(math.log2(length / trained) + 1) - 1, 1.0)
    elif length > trained:
        stretch = scaling.factor * length / trained - (scaling.factor - 1)
    else:
        stretch = scaling.factor if scaling.kind == "turbomind" else 1.0
    return float(config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2)))


def check_rope(config: ModelConfig) -> None:
    """ValueError, worded to follow the name of a file, where the rotary embedding of a model cannot be computed."""
    scaling = config.rope_scaling
    numbers: dict[str, float] = {"rope_theta": config.rope_theta}
    if scaling is not None:
        numbers |= {name: getattr(scaling, name) for name in NUMBERS}
        if scaling.kind in ("llama3", "yarn"):
            numbers["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        if scaling.kind in DYNAMIC and config.head_dim < 4:
            raise ValueError(
                f"has heads of {config.head_dim} with a rotary base that grows: that takes heads from 4 on"
            )
        if scaling.kind == "yarn" and config.rope_theta <= 1:
            raise ValueError(f"has rope_theta = {config.rope_theta} with yarn, which takes a base above 1")
    for name, value in numbers.items():
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"has {name} = {value} for the rotary embedding: it takes {SMALLEST:g} to {LARGEST:g}")
    if config.logn and config.max_position_embeddings < 2:
        raise ValueError("has logn attention, which takes max_position_embeddings from 2 on")


def read_rope(fields: Mapping[str, Any], *, trained: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_theta`, `rope_scaling`, `rope_parameters` (transformers 5) and InternLM's `rotary`.

    `trained` is max_position_embeddings. ValueError names the field, the value and what is computed.
    """
    bases: dict[str, float] = {}
    scalings: dict[str, RopeScaling | None] = {}
    for name in ("rope_scaling", "rope_parameters", "rotary"):
        given = fields.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise refused(name, given, "null or {'rope_type': 'default', ...}")
        numbers = _internlm(given) if name == "rotary" else dict(given)
        if numbers.get("rope_theta") is not None:
            bases[name] = _number(numbers, "rope_theta", name)
        numbers.pop("rope_theta", None)
        scalings[name] = _scaling(numbers, name, trained=trained)
    if fields.get("rope_theta") is not None:
        bases["rope_theta"] = _number(fields, "rope_theta", "")
    if len(set(bases.values())) > 1:
        raise ValueError(f"config.json gives more than one base of the rotary embedding: {bases}; keep one of them")
    if len(set(scalings.values())) > 1:
        raise ValueError(f"config.json scales the rotary embedding in more than one way: {scalings}; keep one of them")
    scaling = next(iter(scalings.values()), None)
    if fields.get("use_dynamic_ntk"):
        if scaling is not None:
            raise refused("use_dynamic_ntk", True, "false beside another scaling of the rotary embedding")
        scaling = RopeScaling(kind="qwen")
    return next(iter(bases.values()), 10000.0), scaling


def _scaling(given: dict[str, Any], field: str, *, trained: int) -> RopeScaling | None:
    """The scaling that an object of config.json asks for; None for the plain embedding."""
    kinds = {str(given[key]) for key in KIND_FIELDS if given.get(key) is not None}
    known = " or ".join(repr(kind) for kind in ("default", *HF_KINDS))
    if len(kinds) > 1 or not kinds <= {"default", *HF_KINDS}:
        raise refused(field, given, f"one rope_type: {known}")
    if given.get("partial_rotary_factor") not in (None, 1):
        raise refused(f"{field}.partial_rotary_factor", given["partial_rotary_factor"], "1.0: all of the head turns")
    kind = next(iter(kinds), "default")
    needed, optional = HF_KINDS.get(kind, ((), ()))
    numbers = {key: value for key, value in given.items() if value is not None}
    unknown = sorted(numbers.keys() - {*needed, *optional, *KIND_FIELDS, "partial_rotary_factor"})
    # Written by some tools beside kinds that do not read it; the length that counts is then max_position_embeddings.
    if unknown == ["original_max_position_embeddings"] and numbers[unknown[0]] == trained:
        unknown = []
    if unknown:
        raise refused(f"{field}.{unknown[0]}", numbers[unknown[0]], f"no such field beside rope_type {kind!r}")
    if kind == "default":
        return None
    values: dict[str, Any] = {
        name: _number(numbers, name, field)
        for name in (*needed, *optional)
        if name != "truncate" and (name in needed or name in numbers)
    }
    if "original_max_position_embeddings" in (*needed, *optional):
        values["original_max_position_embeddings"] = int(values.get("original_max_position_embeddings", trained))
    if kind == "yarn":
        values |= _yarn(values, numbers.get("truncate", True), field)
    if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise refused(f"{field}.low_freq_factor", values["low_freq_factor"], "a number below high_freq_factor")
    return RopeScaling(kind=cast(RopeKind, kind), **values)


def _yarn(values: dict[str, Any], truncate: object, field: str) -> dict[str, Any]:
    """What YaRN multiplies cos and sin by, unless it is said (Peng et al. 2023, section 3.4)."""
    if not isinstance(truncate, bool):
        raise refused(f"{field}.truncate", truncate, "true or false")
    mscale, mscale_all = values.pop("mscale", None), values.pop("mscale_all_dim", None)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(values["factor"]) + 1.0 if values["factor"] > 1 else 1.0

    inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return {"attention_factor": values.get("attention_factor", inferred), "truncate": truncate}


def _internlm(given: Mapping[str, Any]) -> dict[str, Any]:
    """InternLM's `rotary` in Hugging Face's words: {'base', 'type': 'origin' or 'dynamic', 'scaling_factor'}."""
    unknown = sorted(given.keys() - {"base", "type", "scaling_factor"})
    if unknown or given.get("type") not in ("origin", "dynamic"):
        raise refused("rotary", dict(given), "{'base': ..., 'type': 'origin' or 'dynamic', 'scaling_factor': ...}")
    words: dict[str, Any] = {"rope_theta": given.get("base"), "rope_type": "default"}
    if given["type"] == "dynamic":
        words |= {"rope_type": "dynamic", "factor": given.get("scaling_factor", 1.0)}
    return words


def _number(fields: Mapping[str, Any], name: str, within: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise refused(f"{within}.{name}" if within else name, value, "a positive number")
    return float(value)


def refused(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(
        f"config.json has {cut(name)} = {shown(value)}, which this engine does not compute: it takes {allowed}."
    )
