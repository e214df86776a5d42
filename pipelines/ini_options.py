"""The keys of config.ini that a build can set (`ini.max_batch_size=128`), and why it cannot set the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.config import EngineConfig
from engine.storage.ini_keys import OF_THE_MODEL, RANGES

_ATTRIBUTE = "it is an attribute of the model, and its weights make sense with no other"
_TOKENIZER = "it is a token of the checkpoint's tokenizer"
FIXED = {
    "model_name": "model.name says it",
    "tensor_para_size": "tp says it",
    **dict.fromkeys(("head_num", "kv_head_num", "vocab_size", "num_layer", "inter_size", "norm_eps"), _ATTRIBUTE),
    "attn_bias": _ATTRIBUTE,
    **dict.fromkeys(("start_id", "end_id"), _TOKENIZER),
    "session_len": "model.session_len says it",
    "weight_type": "it follows from the type of the checkpoint and from weights",
    **dict.fromkeys(("rotary_embedding", "rope_theta", "size_per_head"), _ATTRIBUTE),
    "group_size": "weights.group_size says it",
    "quant_policy": "kv says it: kv=kv8 writes 4, with the scales that int8 needs, and kv=kv16 writes 0",
}


@dataclass
class Ini:
    """config.ini's own keys, with TurboMind's meanings (docs/formats.md); null is what the converter writes.

    `cache_max_entry_count` is a number in the file, as the reference reads it: an amount such as 4GB is for serving.
    """

    max_batch_size: int | None = None
    max_context_token_num: int | None = None
    step_length: int | None = None
    cache_max_entry_count: int | float | str | None = None
    cache_block_seq_len: int | None = None
    cache_chunk_size: int | None = None
    use_context_fmha: int | None = None
    max_position_embeddings: int | None = None
    rope_scaling_factor: float | None = None
    use_logn_attn: int | None = None
    num_tokens_per_iter: int | None = None
    extra_tokens_per_iter: int | None = None
    max_prefill_iters: int | None = None


def written(ini: Ini) -> dict[str, Any]:
    """What is set, by key, a share or number of pages as config.ini has it."""
    found = {key: value for key, value in asdict(ini).items() if value is not None}
    if "cache_max_entry_count" in found:
        found["cache_max_entry_count"] = float(found["cache_max_entry_count"])
    return found


def problems(ini: Ini) -> Iterator[str]:
    """A sentence for every value out of range."""
    for key, value in asdict(ini).items():
        accepts, allowed = RANGES[key]
        if value is None:
            continue
        if isinstance(value, str):
            yield (
                f"ini.{key}={value} must be {allowed}: config.ini holds numbers, and an amount of memory is said when "
                f"serving (serve.{key}={value})"
            )
        elif not accepts(value):
            yield f"ini.{key}={value} must be {allowed}"
        elif key in OF_THE_MODEL:
            try:
                EngineConfig(**{key: value})
            except ValueError as error:
                yield f"ini.{str(error).rstrip('.')}"


def check_overrides(overrides: Sequence[str]) -> None:
    """ValueError for an override of a key of config.ini that is not set, or not set like this, saying how or why not.

    With + in front Hydra would add such a key, and nobody would read it.
    """
    settable = Ini.__dataclass_fields__
    for override in overrides:
        path = str(override).lstrip("+~").partition("=")[0]
        key = path.removeprefix("ini.")
        if path not in (key, f"ini.{key}") or "." in key:
            continue
        if key in FIXED:
            raise ValueError(f"{path} cannot be set: {FIXED[key]}.")
        if key == path and key in settable:
            raise ValueError(f"{key} is a key of config.ini: set ini.{key}.")
        if key != path and key not in settable:
            raise ValueError(f"config.ini has no key {key}. Those that can be set: {', '.join(settable)}.")
