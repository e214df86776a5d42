"""What config.json says about weights that are quantized already: the two forms that are read, all others by name.

No torch. Every field is one of three: it is read here, it must have a value under which the numbers are those of plain
4-bit groups or of 8-bit rows times 8-bit tokens, or it is known to change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.wording import cut, shown

FIELDS = ("quantization_config", "compression_config")
AWQ, PACKED, SMOOTH_QUANT = "awq", "compressed-tensors", "smooth_quant"
READ = (
    "quantized checkpoints are read as awq (GEMM, 4 bits), as compressed-tensors (pack-quantized, 4 bits in groups; "
    "int-quantized, 8 bits a row with 8-bit tokens) and as smooth_quant (LMDeploy's 8 bits). Of another one take the "
    "unquantized checkpoint, and quantize it here (weights=w4a16 or w8a8)"
)

# Field -> the values that it may have where it is there; `group_size` is read. Of AutoAWQ and of transformers.
AWQ_FIELDS: dict[str, tuple[Any, ...]] = {
    "bits": (4,),
    "w_bit": (4,),
    "zero_point": (True,),
    "version": (None, "gemm", "GEMM"),
    "format": (None, "gemm", "GEMM"),
    "desc_act": (None, False),
    "lm_head": (None, False),
    "dynamic": (None, {}),
    "rotation": (None,),
}
# Which modules are quantized is seen in the tensors; the rest says how it was done, or how others run it.
AWQ_HARMLESS = frozenset(
    [
        "quant_method",
        "group_size",
        "q_group_size",
        "modules_to_not_convert",
        "backend",
        "do_fuse",
        "fuse_max_seq_len",
        "modules_to_fuse",
        "exllama_config",
        "sym",
        "true_sequential",
        "act_group_aware",
        "damp_percent",
        "damp_auto_increment",
        "static_groups",
        "meta",
        "tokenizer",
        "dataset",
        "model_seqlen",
        "block_name_to_quantize",
        "module_name_preceding_first_block",
        "batch_size",
        "pad_token_id",
        "max_input_length",
        "cache_block_outputs",
        "modules_in_block_to_quantize",
        "pack_dtype",
        "checkpoint_format",
    ]
)
SMOOTH_QUANT_FIELDS: dict[str, tuple[Any, ...]] = {"quant_dtype": (None, "int8")}
PACKED_FIELDS: dict[str, tuple[Any, ...]] = {
    "format": ("pack-quantized", "int-quantized"),
    "quantization_status": (None, "compressed"),
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None,),
}
PACKED_HARMLESS = frozenset(
    [
        "quant_method",
        "config_groups",
        "version",
        "ignore",
        "global_compression_ratio",
        "run_compressed",
        "dequantize",
        "use_optimized_inference",
    ]
)
GROUP_FIELDS: dict[str, tuple[Any, ...]] = {
    "input_activations": (None,),
    "output_activations": (None,),
    "format": (None, "pack-quantized"),
}
WEIGHTS_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "strategy": ("group",),
    "block_structure": (None,),
    "dynamic": (None, False),
    # An order that is left in the file has a weight_g_idx beside each weight, which the reader looks at.
    "actorder": (None, False, "weight", "static", "group", "dynamic"),
}
WEIGHTS_HARMLESS = frozenset(["group_size", "symmetric", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"])
INT8_GROUP_FIELDS: dict[str, tuple[Any, ...]] = {
    "output_activations": (None,),
    "format": (None, "int-quantized"),
}
INT8_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "group_size": (None,),
    "block_structure": (None,),
    "actorder": (None, False),
}
INT8_WEIGHTS_FIELDS = INT8_FIELDS | {"strategy": ("channel",), "dynamic": (None, False)}
INT8_TOKENS_FIELDS = INT8_FIELDS | {"strategy": ("token",), "dynamic": (True,)}
INT8_HARMLESS = frozenset(["observer", "observer_kwargs", "scale_dtype", "zp_dtype"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """4-bit weights in groups of `group_size` inputs, or 8-bit ones with a scale a row (`group_size` 0) that are
    multiplied with 8-bit tokens. `symmetric`: there are no zero points; in 4 bits all are 8."""

    method: Literal["awq", "compressed-tensors", "smooth_quant"]
    group_size: int
    symmetric: bool = False

    @property
    def int8(self) -> bool:
        """Whether it is w8a8."""
        return self.group_size == 0

    def __str__(self) -> str:
        return f"{self.method}, " + ("8 bits, a scale a row" if self.int8 else f"4 bits in groups of {self.group_size}")


W8A8_OF_LMDEPLOY = Quantization(method="smooth_quant", group_size=0, symmetric=True)


def read_quantization(hf_config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says; None for weights that are not quantized. ValueError names method or field and value."""
    field = next((name for name in FIELDS if hf_config.get(name)), None)
    if field is None:
        return None
    said = hf_config[field]
    if not isinstance(said, Mapping):
        raise _refused(field, said, "an object with `quant_method`")
    method = said.get("quant_method")
    if isinstance(method, str) and method.lower() == AWQ:
        _check(said, field, AWQ_FIELDS, AWQ_HARMLESS)
        size = said.get("group_size", said.get("q_group_size"))
        return Quantization(method="awq", group_size=_group_size(size, f"{field}.group_size"))
    if method == PACKED:
        return _packed(said, field)
    if method == SMOOTH_QUANT:
        _check(said, field, SMOOTH_QUANT_FIELDS, ("quant_method",))
        return W8A8_OF_LMDEPLOY
    raise _refused(f"{field}.quant_method", method, READ)


def unquantized(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model before it was quantized."""
    return {name: value for name, value in hf_config.items() if name not in FIELDS}


def check_source(hf_config: Mapping[str, Any], weights: str, where: object) -> None:
    """ValueError where `weights` does not go with a source: as_is with quantized ones, all others with the rest."""
    quantized = read_quantization(hf_config)
    if quantized is not None and weights != "as_is":
        raise ValueError(
            f"{where} is quantized already ({quantized}), and weights={weights} starts from unquantized weights. Set "
            "weights=as_is to take it as it is, or give the unquantized checkpoint."
        )
    if quantized is None and weights == "as_is":
        raise ValueError(
            f"{where} is not quantized (its config.json has no quantization_config), and weights=as_is takes over what "
            "a checkpoint has. Set weights=w4a16 or w8a8 to quantize it, or weights=fp16."
        )


def _packed(said: Mapping[str, Any], field: str) -> Quantization:
    _check(said, field, PACKED_FIELDS, PACKED_HARMLESS)
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _refused(f"{field}.config_groups", groups, "an object of groups, each with its `weights`")
    found: set[Quantization] = set()
    for name, group in groups.items():
        place = f"{field}.config_groups.{name}"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise _refused(place, group, "an object with `weights`")
        if said.get("format") == "int-quantized":
            found.add(_int8(group, weights, place))
            continue
        _check(weights, f"{place}.weights", WEIGHTS_FIELDS, WEIGHTS_HARMLESS)
        _check(group, place, GROUP_FIELDS, ("targets", "weights"))
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise _refused(f"{place}.weights.symmetric", symmetric, "true or false")
        size = _group_size(weights.get("group_size"), f"{place}.weights.group_size")
        found.add(Quantization(method="compressed-tensors", group_size=size, symmetric=symmetric))
    if len(found) > 1:
        raise _refused(f"{field}.config_groups", sorted(groups), "groups that are all quantized alike")
    return found.pop()


def _int8(group: Mapping[str, Any], weights: Mapping[str, Any], place: str) -> Quantization:
    tokens = group.get("input_activations")
    if not isinstance(tokens, Mapping):
        raise _refused(f"{place}.input_activations", tokens, f"8-bit weights go with 8-bit activations alone: {READ}")
    _check(group, place, INT8_GROUP_FIELDS, ("targets", "weights", "input_activations"))
    for part, fields, name in (
        (weights, INT8_WEIGHTS_FIELDS, "weights"),
        (tokens, INT8_TOKENS_FIELDS, "input_activations"),
    ):
        where = f"{place}.{name}"
        _check(part, where, fields, INT8_HARMLESS)
        for needed in ("num_bits", "strategy"):
            if needed not in part:
                raise _refused(f"{where}.{needed}", None, READ)
    if not tokens.get("dynamic"):
        raise _refused(f"{place}.input_activations.dynamic", tokens.get("dynamic"), f"it may be True: {READ}")
    return Quantization(method="compressed-tensors", group_size=0, symmetric=True)


def _check(
    said: Mapping[str, Any], place: str, allowed: Mapping[str, tuple[Any, ...]], harmless: Iterable[str]
) -> None:
    for name, value in said.items():
        if name in allowed:
            if value not in allowed[name]:
                listed = " or ".join(repr(one) for one in allowed[name] if one is not None) or "null"
                raise _refused(f"{place}.{name}", value, f"it may be {listed}: {READ}")
        elif name not in harmless:
            raise _refused(f"{place}.{name}", value, f"this field is not known, and may change the numbers: {READ}")


def _group_size(value: object, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refused(place, value, "a whole number from 1 on: a TurboMind workspace has groups of inputs")
    return value


def _refused(place: str, value: object, why: str) -> ValueError:
    return ValueError(f"config.json has {cut(place)} = {shown(value)}, which is not read here: {why}.")
