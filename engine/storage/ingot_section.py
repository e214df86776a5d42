"""The section `[ingot]` of config.ini: what a model needs that TurboMind's keys cannot say.

The reference does not read it. Keys are in alphabetical order and values are JSON; a key, and the section, are there
only where needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from engine.config import HEADS, ROTATIONS, KVGranularity, ModelConfig, Recipe, RopeKind, RopeScaling
from engine.wording import cut, shown

SECTION = "ingot"
# Said by `rope_scaling_factor` of the section [llama].
IN_LLAMA = "turbomind"
LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IngotSection:
    """`hidden_size` is None where it is heads x head_dim; `float_type` is "bf16" where what is not int8 is that and not
    fp16; `head` is "int8" or "int4" where the output matrix is; `kv_granularity` is Recipe's, `rotate_down`
    Recipe's and ModelConfig's, the others ModelConfig's.
    """

    float_type: str | None = None
    head: str | None = None
    hidden_size: int | None = None
    kv_granularity: KVGranularity = "tensor"
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    rotate_down: int = 0
    sliding_window: int | None = None


def section_of(config: ModelConfig, recipe: Recipe) -> IngotSection:
    """What has to be said of a model and its recipe."""
    square = config.hidden_size == config.num_heads * config.head_dim
    scaling = config.rope_scaling
    return IngotSection(
        hidden_size=None if square else config.hidden_size,
        kv_granularity=recipe.kv_granularity if recipe.kv == "kv8" else "tensor",
        qk_norm=config.qk_norm,
        rope_scaling=None if scaling is not None and scaling.kind == IN_LLAMA else scaling,
        rotate_down=recipe.rotate_down,
        sliding_window=config.sliding_window,
    )


def section_lines(section: IngotSection) -> list[str]:
    """The section as lines of the file; none where there is nothing to say."""
    lines = []
    for field in sorted(fields(IngotSection), key=lambda field: field.name):
        value = getattr(section, field.name)
        if value != field.default:
            json_value = _changed(value) if isinstance(value, RopeScaling) else value
            lines.append(f"{field.name} = {json.dumps(json_value, sort_keys=True)}")
    return [f"[{SECTION}]", *lines] if lines else []


def read_section(texts: Mapping[str, str], path: Path) -> IngotSection:
    """The section read and checked; ValueError names the file and the key that is unknown or has a wrong value."""
    known = {field.name for field in fields(IngotSection)}
    values: dict[str, Any] = {}
    for key, text in texts.items():
        if key not in known:
            raise ValueError(f"{path}: unknown key {cut(key)} in [{SECTION}]. Known keys: {', '.join(sorted(known))}")
        try:
            values[key] = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: [{SECTION}] {key} = {shown(text)} is not JSON") from None
    for key in ("hidden_size", "sliding_window"):
        if key in values and (type(values[key]) is not int or not 1 <= values[key] <= LARGEST):
            raise ValueError(
                f"{path}: [{SECTION}] {key} = {cut(texts[key])} must be a whole number from 1 on, up to {LARGEST}"
            )
    if "rotate_down" in values and (type(values["rotate_down"]) is not int or values["rotate_down"] not in ROTATIONS):
        raise ValueError(
            f"{path}: [{SECTION}] rotate_down = {cut(texts['rotate_down'])} must be one of "
            + ", ".join(map(str, ROTATIONS))
        )
    if type(values.get("qk_norm", True)) is not bool:
        raise ValueError(f"{path}: [{SECTION}] qk_norm = {cut(texts['qk_norm'])} must be true or false")
    if values.get("float_type", "bf16") != "bf16":
        raise ValueError(f'{path}: [{SECTION}] float_type = {cut(texts["float_type"])} may only be "bf16"')
    if "head" in values and values["head"] not in HEADS[1:]:
        raise ValueError(f"{path}: [{SECTION}] head = {cut(texts['head'])} must be one of {', '.join(HEADS[1:])}")
    granularities = get_args(KVGranularity)
    if values.get("kv_granularity", "tensor") not in granularities:
        raise ValueError(
            f"{path}: [{SECTION}] kv_granularity = {cut(texts['kv_granularity'])} must be one of "
            + ", ".join(f'"{name}"' for name in granularities)
        )
    if "rope_scaling" in values:
        values["rope_scaling"] = _rope_scaling(values["rope_scaling"], texts["rope_scaling"], path)
    return IngotSection(**values)


def _changed(scaling: RopeScaling) -> dict[str, Any]:
    """The numbers that differ from their defaults: the others play no part in the kind."""
    defaults = {field.name: field.default for field in fields(RopeScaling)}
    return {name: value for name, value in asdict(scaling).items() if value != defaults[name]}


def _rope_scaling(value: object, text: str, path: Path) -> RopeScaling:
    where = f"{path}: [{SECTION}] rope_scaling"
    if not isinstance(value, dict) or any(isinstance(one, dict | list) for one in value.values()):
        raise ValueError(f"{where} must be a JSON object of numbers, not {cut(text)}")
    kinds = [kind for kind in get_args(RopeKind) if kind != IN_LLAMA]
    if value.get("kind") not in kinds:
        raise ValueError(f"{where} has kind {shown(value.get('kind'))}; known kinds: {', '.join(kinds)}")
    types = {field.name: str if field.default is MISSING else type(field.default) for field in fields(RopeScaling)}
    for name, number in value.items():
        if name not in types:
            raise ValueError(f"{where} has an unknown number {cut(name)}; known: {', '.join(types)}")
        fits = type(number) is types[name] or (types[name] is float and type(number) is int)
        if not fits or (types[name] in (int, float) and not 0 < number <= LARGEST):
            raise ValueError(f"{where} has {name} = {shown(number)}, which must be a positive number or true or false")
    numbers: dict[str, Any] = {name: types[name](number) for name, number in value.items()}
    return RopeScaling(**numbers)
