"""`config.ini` of a TurboMind workspace: every key, in the reference's order, typed and checked."""

from __future__ import annotations

import configparser
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from engine.config import ModelConfig, Recipe, RopeScaling
from engine.storage import ingot_section
from engine.storage.ingot_section import IngotSection

Value = int | float | str
SECTION = "llama"
WEIGHT_TYPES = ("fp16", "bf16", "int4")
KV_INT8 = 4


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
    **dict.fromkeys(("norm_eps", "rope_theta", "cache_max_entry_count"), _POSITIVE),
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

# How the reference's engine runs a workspace; every other key describes the weight files.
RUNTIME_KEYS = (
    "max_batch_size",
    "max_context_token_num",
    "cache_max_entry_count",
    "cache_block_seq_len",
    "cache_chunk_size",
    "use_context_fmha",
    "rope_scaling_factor",
    "use_logn_attn",
    "num_tokens_per_iter",
    "extra_tokens_per_iter",
    "max_prefill_iters",
)


def weight_type_of(config: ModelConfig, recipe: Recipe) -> str:
    """The `weight_type` of a model under a recipe: float32 sources are stored as fp16, as the reference does."""
    if recipe.weights == "w4a16":
        return "int4"
    return "bf16" if config.dtype == "bfloat16" else "fp16"


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
    """Write `config.ini` as the reference's converter prints it; `extra` sets runtime keys (`max_batch_size`, ...).

    `model_name` is the chat template's name and `session_len` the longest sequence: the reference takes both from
    its template table, here the caller says them. Raises ValueError naming the key for a value out of range.
    """
    extra = dict(extra or {})
    if fixed := [key for key in extra if key not in RUNTIME_KEYS]:
        raise ValueError(f"config.ini: {', '.join(fixed)} cannot be set here. Keys that can: {', '.join(RUNTIME_KEYS)}")
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
    ini = _typed({key: str(value) for key, value in (values | extra).items()}, ingot_section.section_of(config), path)
    lines = [f"{key} = {value}" for key in KEYS if (value := getattr(ini, key)) is not None]
    ours = ingot_section.section_lines(ini.ingot)
    path.write_text(
        "\n".join([f"[{SECTION}]", *lines, "", *ours, *([""] if ours else []), ""]), encoding="utf-8", newline="\n"
    )
    return ini


def read_config_ini(path: Path) -> IniConfig:
    """Read and check `config.ini`; ValueError names the file and the key that is unknown, missing or out of range."""
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys are case-sensitive here
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TurboMind config.ini: {' '.join(str(error).split())}") from error
    if parser.sections() not in ([SECTION], [SECTION, ingot_section.SECTION]):
        found = ", ".join(f"[{name}]" for name in parser.sections()) or "none"
        raise ValueError(
            f"{path} must have the section [{SECTION}], and may have [{ingot_section.SECTION}] after it; found: {found}"
        )
    ours = dict(parser[ingot_section.SECTION]) if parser.has_section(ingot_section.SECTION) else {}
    return _typed(dict(parser[SECTION]), ingot_section.read_section(ours, path), path)


def model_config_of(ini: IniConfig, path: Path) -> ModelConfig:
    """The model that a config.ini describes; ValueError for two scalings of the rotary embedding at once.

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
    return ModelConfig(
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
        # The file has one key for all biases; one that the model lacks is stored as zeros.
        qkv_bias=bool(ini.attn_bias),
        o_bias=bool(ini.attn_bias),
        dtype="bfloat16" if ini.weight_type == "bf16" else "float16",
        bos_token_id=ini.start_id if ini.start_id >= 0 else None,
        eos_token_ids=(ini.end_id,) if ini.end_id >= 0 else (),
    )


def _typed(texts: Mapping[str, str], ingot: IngotSection, path: Path) -> IniConfig:
    known = {field.name: field for field in fields(IniConfig) if field.name in KEYS}
    if unknown := [key for key in texts if key not in known]:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}. Known keys: {', '.join(known)}")
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
            f"{path}: {key} = {text!r} is not {'a whole number' if kind != 'float' else 'a number'}"
        ) from None
    accepts, allowed = RANGES[key]
    if (isinstance(value, float) and not math.isfinite(value)) or not accepts(value):
        raise ValueError(f"{path}: {key} = {text} is out of range; allowed: {allowed}")
    return value
