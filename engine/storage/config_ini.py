"""`config.ini` of a TurboMind workspace: every key, in the reference's order, typed and checked."""

from __future__ import annotations

import configparser
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ModelConfig, Recipe, RopeScaling
from engine.models.rope_scaling import check_rope
from engine.storage import ingot_section
from engine.storage.ingot_section import IngotSection
from engine.storage.ini_keys import KEYS, KV_INT8, LARGEST, OF_THE_MODEL, RANGES, RUNTIME_KEYS, IniConfig, Value
from engine.wording import cut, shown

SECTION = "llama"
# Weights whose files have a type of their own.
RECIPE_OF = {"int4": "w4a16", "int8": "w8a8"}
BFLOAT16 = "bf16"


def weight_type_of(config: ModelConfig, recipe: Recipe) -> str:
    """The `weight_type` of a model under a recipe: float32 sources are stored as fp16, as the reference does."""
    own = next((weight_type for weight_type, weights in RECIPE_OF.items() if weights == recipe.weights), None)
    return own or (BFLOAT16 if config.dtype == "bfloat16" else "fp16")


def write_config_ini(
    path: Path,
    config: ModelConfig,
    *,
    model_name: str,
    recipe: Recipe,
    tp: int,
    session_len: int,
    weight_type: str,
    extra: Mapping[str, Value] | None = None,
) -> IniConfig:
    """Write `config.ini` as the reference's converter prints it; `extra` sets RUNTIME_KEYS.

    `model_name` is the chat template's name and `session_len` the longest sequence: the reference takes both from
    its template table, here the caller says them. Raises ValueError naming the key for a value out of range, and for a
    rope_scaling_factor beside a scaling of the model's own.
    """
    extra = dict(extra or {})
    if fixed := [key for key in extra if key not in RUNTIME_KEYS]:
        raise ValueError(f"config.ini: {', '.join(fixed)} cannot be set here. Keys that can: {', '.join(RUNTIME_KEYS)}")
    options: dict[str, Any] = {name: extra[name] for name in OF_THE_MODEL if name in extra}
    config = EngineConfig(**options).applied_to(config)
    values: dict[str, Value] = {
        "model_name": model_name,
        "tensor_para_size": tp,
        "head_num": config.num_heads,
        "kv_head_num": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "num_layer": config.num_layers,
        "inter_size": config.intermediate_size,
        "norm_eps": config.norm_eps,
        "attn_bias": int(config.qkv_bias or config.o_bias),
        "start_id": -1 if config.bos_token_id is None else config.bos_token_id,
        "end_id": config.eos_token_ids[0] if config.eos_token_ids else -1,
        "session_len": session_len,
        "weight_type": weight_type,
        "rotary_embedding": config.head_dim,
        "rope_theta": config.rope_theta,
        "size_per_head": config.head_dim,
        "group_size": recipe.group_size if weight_type == "int4" else 0,
        "quant_policy": KV_INT8 if recipe.kv == "kv8" else 0,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_scaling_factor": 0.0,
        "use_logn_attn": int(config.logn),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "turbomind":
        values["rope_scaling_factor"] = config.rope_scaling.factor
    ours = ingot_section.section_of(config, recipe)
    if weight_type == "int8" and config.dtype == "bfloat16":
        ours = replace(ours, float_type=BFLOAT16)
    if recipe.head != "fp16":
        ours = replace(ours, head=recipe.head)
    ini = _typed({key: str(value) for key, value in (values | extra).items()}, ours, path)
    lines = [f"{key} = {value}" for key in KEYS if (value := getattr(ini, key)) is not None]
    more = ingot_section.section_lines(ini.ingot)
    path.write_text(
        "\n".join([f"[{SECTION}]", *lines, "", *more, *([""] if more else []), ""]), encoding="utf-8", newline="\n"
    )
    return ini


def engine_config_of(ini: IniConfig) -> EngineConfig:
    """What a config.ini says about running the model; the rest it says about the model itself (`model_config_of`)."""
    return EngineConfig(
        session_len=ini.session_len,
        max_batch_size=ini.max_batch_size,
        num_tokens_per_iter=ini.num_tokens_per_iter or 0,
        cache_max_entry_count=ini.cache_max_entry_count,
        cache_block_seq_len=ini.cache_block_seq_len,
        quant_policy=ini.quant_policy,
    )


def read_config_ini(path: Path) -> IniConfig:
    """Read and check `config.ini`; ValueError names the file and the key that is unknown, missing or out of range."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys are case-sensitive here
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TurboMind config.ini: {cut(' '.join(str(error).split()))}") from error
    if parser.sections() not in ([SECTION], [SECTION, ingot_section.SECTION]):
        found = cut(", ".join(f"[{name}]" for name in parser.sections()) or "none")
        raise ValueError(
            f"{path} must have the section [{SECTION}], and may have [{ingot_section.SECTION}] after it; found: {found}"
        )
    ours = dict(parser[ingot_section.SECTION]) if parser.has_section(ingot_section.SECTION) else {}
    texts, ingot = dict(parser[SECTION]), ingot_section.read_section(ours, path)
    if "cache_block_seq_len" not in texts:
        texts, dynamic_ntk = _completed(texts, path)
        if dynamic_ntk:
            ingot = replace(ingot, rope_scaling=RopeScaling(kind="qwen"))
    return _typed(texts, ingot, path)


def model_config_of(ini: IniConfig, path: Path) -> ModelConfig:
    """The model that a config.ini describes; ValueError for two scalings of the rotary embedding at once, and for
    one that cannot be computed.

    Below 1, `rope_scaling_factor` does nothing, as in the reference's engine.
    """
    scaling = ini.ingot.rope_scaling
    if ini.rope_scaling_factor >= 1.0:
        if scaling is not None:
            raise ValueError(
                f"{path}: rope_scaling_factor {ini.rope_scaling_factor} does not go with the model's own scaling, "
                f"rope_scaling of the section [{ingot_section.SECTION}]: set it to 0.0"
            )
        scaling = RopeScaling(kind="turbomind", factor=ini.rope_scaling_factor)
    config = ModelConfig(
        family="llama",
        vocab_size=ini.vocab_size,
        hidden_size=ini.ingot.hidden_size or ini.head_num * ini.size_per_head,
        num_layers=ini.num_layer,
        num_heads=ini.head_num,
        num_kv_heads=ini.kv_head_num,
        head_dim=ini.size_per_head,
        intermediate_size=ini.inter_size,
        norm_eps=ini.norm_eps,
        rope_theta=ini.rope_theta,
        rope_scaling=scaling,
        # 0 means that the checkpoint did not say; the reference's engine then takes 2048.
        max_position_embeddings=ini.max_position_embeddings or 2048,
        sliding_window=ini.ingot.sliding_window,
        logn=bool(ini.use_logn_attn),
        qk_norm=ini.ingot.qk_norm,
        rotate_down=ini.ingot.rotate_down,
        # The file has one key for all biases; one that the model lacks is stored as zeros.
        qkv_bias=bool(ini.attn_bias),
        o_bias=bool(ini.attn_bias),
        dtype="bfloat16" if BFLOAT16 in (ini.weight_type, ini.ingot.float_type) else "float16",
        bos_token_id=ini.start_id if ini.start_id >= 0 else None,
        eos_token_ids=(ini.end_id,) if ini.end_id >= 0 else (),
    )
    try:
        check_rope(config)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return config


def _completed(texts: Mapping[str, str], path: Path) -> tuple[dict[str, str], bool]:
    """A file of TurboMind 1 (LMDeploy v0.0.x) with the keys that its converters did not write yet, as its engine took
    them, and whether it asks for dynamic NTK, which was Qwen's.

    It had no pages: its cache_max_entry_count is a number of sequences, and is left out. Ranks are counted by their
    files.
    """
    ranks = len({*path.parent.glob("layers.0.feed_forward.w2.*.*weight")})
    missing = {"tensor_para_size": str(max(ranks, 1)), "rope_theta": "10000.0"}
    if "head_num" in texts:
        missing["kv_head_num"] = texts["head_num"]
    completed = missing | dict(texts)
    completed.pop("cache_max_entry_count", None)
    dynamic_ntk = completed.pop("use_dynamic_ntk", "0")
    if dynamic_ntk not in ("0", "1"):
        raise ValueError(f"{path}: use_dynamic_ntk = {shown(dynamic_ntk)} is out of range; allowed: 0 or 1")
    return completed, dynamic_ntk == "1"


def _typed(texts: Mapping[str, str], ingot: IngotSection, path: Path) -> IniConfig:
    known = {field.name: field for field in fields(IniConfig) if field.name in KEYS}
    if unknown := [key for key in texts if key not in known]:
        raise ValueError(f"{path}: unknown key {cut(', '.join(unknown))}. Known keys: {', '.join(known)}")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in texts]:
        raise ValueError(f"{path}: key {', '.join(missing)} is missing")
    values = {key: _value(key, text, str(known[key].type), path) for key, text in texts.items()}
    ini = IniConfig(**values, ingot=ingot)  # type: ignore[arg-type]
    if ini.head_num % ini.kv_head_num:
        raise ValueError(f"{path}: head_num {ini.head_num} is not a multiple of kv_head_num {ini.kv_head_num}")
    if ini.rotary_embedding != ini.size_per_head:
        raise ValueError(
            f"{path}: rotary_embedding {ini.rotary_embedding} differs from size_per_head {ini.size_per_head}; "
            "rotary embeddings over a part of the head are not supported"
        )
    if (ini.weight_type == "int4") != (ini.group_size > 0):
        raise ValueError(
            f"{path}: weight_type {ini.weight_type} does not go with group_size {ini.group_size}: "
            "int4 needs a group_size above 0, the others need 0"
        )
    if ini.ingot.float_type is not None and ini.weight_type != "int8":
        raise ValueError(
            f"{path}: float_type of the section [{ingot_section.SECTION}] goes with weight_type int8 alone; "
            f"{ini.weight_type} says the type of floats itself"
        )
    if ini.ingot.rotate_down and ini.weight_type != "int8":
        raise ValueError(
            f"{path}: rotate_down of the section [{ingot_section.SECTION}] goes with weight_type int8 alone, not with "
            f"{ini.weight_type}: only int8 inputs are rotated"
        )
    return ini


def _value(key: str, text: str, kind: str, path: Path) -> Value:
    value: Value = text
    try:
        if kind.startswith("int"):
            value = int(text)
        elif kind == "float":
            value = float(text)
    except ValueError:
        raise ValueError(
            f"{path}: {key} = {shown(text)} is not {'a whole number' if kind != 'float' else 'a number'}"
        ) from None
    accepts, allowed = RANGES[key]
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{path}: {key} = {cut(text)} is out of range; no number is above {LARGEST}")
    if (isinstance(value, float) and not math.isfinite(value)) or not accepts(value):
        raise ValueError(f"{path}: {key} = {cut(text)} is out of range; allowed: {allowed}")
    return value
