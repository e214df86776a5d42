"""One decoder layer from float tensors to 4-bit ones: choose a scale per pair, apply it, round, pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models import names
from pipelines.quant.observers import Statistics
from pipelines.quant.pairs import ATTENTION_OUT, PAIRS, Pair, divide_outputs, fold_heads, repeat_heads
from pipelines.quant.stream import Workers
from pipelines.quant.w4a16 import awq
from pipelines.quant.w4a16.pack import pack_codes
from pipelines.quant.w4a16.rounding import GroupCodes, quantize_groups, quantize_groups_as_reference

Tensors = dict[str, Tensor]
STORED = torch.float16  # the type of everything beside int4 weights in a workspace


@dataclass(slots=True, kw_only=True)
class QuantizedLayer:
    """A layer's result, names within the layer.

    `tensors` are those that stay floats (norms, biases), `codes` the linears, `smoothing` the scale [channels] that
    the outputs of a linear were divided by, and `report` has a row per pair.
    """

    tensors: Tensors
    codes: dict[str, GroupCodes]
    smoothing: Tensors = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)

    def packed(self) -> Tensors:
        """The tensors as they are stored."""
        packed = {
            f"{module}.{part}": tensor
            for module, codes in self.codes.items()
            for part, tensor in pack_codes(codes).items()
        }
        return packed | self.tensors

    def dense(self) -> Tensors:
        """The tensors as the engine will compute with them, in float32."""
        dense = {f"{module}.weight": codes.dequantize() for module, codes in self.codes.items()}
        return dense | {name: tensor.float() for name, tensor in self.tensors.items()}


def quantize_as_reference(
    tensors: Mapping[str, Tensor], absmax: Mapping[str, Tensor], config: ModelConfig, *, group_size: int, alpha: float
) -> QuantizedLayer:
    """LMDeploy v0.1.0's `auto_awq` of one layer, in float16 arithmetic; `absmax` [in] by linear.

    With grouped-query attention v_proj and o_proj are left as they are, as there.
    """
    scaled = {name: tensor.to(STORED) for name, tensor in tensors.items()}
    smoothing: Tensors = {}
    report: list[dict[str, Any]] = []
    for pair in PAIRS:
        if pair is ATTENTION_OUT and config.num_heads != config.num_kv_heads:
            report.append({"pair": pair.name, "skipped": "grouped-query attention"})
            continue
        weights = [scaled[f"{module}.weight"] for module in pair.after]
        scale = awq.reference_scale(weights, absmax[pair.after[0]], group_size=group_size, alpha=alpha)
        scaled |= divide_outputs(scaled, pair.before, scale)
        for module in pair.after:
            scaled[f"{module}.weight"] = scaled[f"{module}.weight"] * scale
        if pair.before in names.LINEARS:
            smoothing[pair.before] = scale.float()
        report.append({"pair": pair.name, "activation_exponent": alpha, "weight_exponent": 1 - alpha})
    codes = {
        module: quantize_groups_as_reference(scaled.pop(f"{module}.weight"), group_size) for module in names.LINEARS
    }
    return QuantizedLayer(tensors=scaled, codes=codes, smoothing=smoothing, report=report)


def quantize_by_search(
    tensors: Mapping[str, Tensor],
    grams: Mapping[str, Statistics],
    config: ModelConfig,
    *,
    group_size: int,
    exponents: Sequence[tuple[float, float]],
    workers: Workers,
) -> QuantizedLayer:
    """Search a scale for every pair, then round; `grams` by linear, of the inputs that this layer will see.

    The scale of v_proj and o_proj is one per V channel, shared by the query heads that read it, so it is exact under
    grouped-query attention too.
    """
    scaled = {name: tensor.float() for name, tensor in tensors.items()}
    smoothing: Tensors = {}
    report: list[dict[str, Any]] = []
    for pair in PAIRS:
        choice = _search(
            scaled, grams[pair.after[0]], pair, config, group_size=group_size, exponents=exponents, workers=workers
        )
        scale = choice.scale
        outputs = fold_heads(scale, config)[0] if pair is ATTENTION_OUT else scale
        scaled |= divide_outputs(scaled, pair.before, outputs)
        for module in pair.after:
            scaled[f"{module}.weight"] = scaled[f"{module}.weight"] * scale
        if pair.before in names.LINEARS:
            smoothing[pair.before] = outputs
        report.append(
            {
                "pair": pair.name,
                "activation_exponent": choice.activation_exponent,
                "weight_exponent": choice.weight_exponent,
                "error_unscaled": choice.unscaled_error,
                "error": choice.error,
            }
        )
    codes = {module: quantize_groups(scaled.pop(f"{module}.weight"), group_size) for module in names.LINEARS}
    kept = {name: tensor.to(STORED) for name, tensor in scaled.items()}
    return QuantizedLayer(tensors=kept, codes=codes, smoothing=smoothing, report=report)


def _search(
    tensors: Mapping[str, Tensor],
    seen: Statistics,
    pair: Pair,
    config: ModelConfig,
    *,
    group_size: int,
    exponents: Sequence[tuple[float, float]],
    workers: Workers,
) -> awq.Choice:
    weights = [tensors[f"{module}.weight"] for module in pair.after]
    gram = seen["gram"] / seen["tokens"]
    power = gram.diagonal()
    channel_weight = awq.mean_in_group(torch.cat(weights), group_size)
    if pair is ATTENTION_OUT:
        power, channel_weight = fold_heads(power, config).mean(dim=0), fold_heads(channel_weight, config).mean(dim=0)

    def storable(scale: Tensor) -> Tensor:
        if pair is ATTENTION_OUT:
            return repeat_heads(scale, config)
        if pair.before in names.NORMS:
            return _norm_quotient(tensors[f"{pair.before}.weight"], scale)
        return scale

    return awq.search_scale(
        weights,
        gram,
        group_size=group_size,
        activation=power.clamp(min=0).sqrt(),
        channel_weight=channel_weight,
        exponents=exponents,
        storable=storable,
        workers=workers,
    )


def _norm_quotient(norm: Tensor, scale: Tensor) -> Tensor:
    """The float32 scale that a norm's weight is really divided by once the result is rounded to what is stored."""
    divided = (norm / scale).to(STORED).float()
    usable = (divided != 0) & torch.isfinite(divided)
    one = torch.ones_like(scale)
    return torch.where(usable, norm / torch.where(usable, divided, one), one)
