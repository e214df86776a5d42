"""One decoder layer from float tensors to 4-bit ones: choose a scale per pair, apply it, round, pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models import names
from pipelines.quant.pairs import ATTENTION_OUT, Pair, divide_outputs, fold_heads, repeat_heads
from pipelines.quant.scales import mean_in_group, norm_quotient, smooth_as_reference
from pipelines.quant.stream import Workers
from pipelines.quant.w4a16 import awq
from pipelines.quant.w4a16.pack import pack_codes
from pipelines.quant.w4a16.rounding import GroupCodes, quantize_groups, quantize_groups_as_reference
from pipelines.quant.w4a16.search import Method, quantize_linears
from pipelines.quant.walk import ORDER, Inputs

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
    """LMDeploy v0.1.0's `auto_awq` of one layer, in float16 arithmetic; `absmax` [in] by linear."""
    scaled, smoothing, report = smooth_as_reference(
        tensors, absmax, config, group_size=group_size, alpha=alpha, dtype=STORED
    )
    codes = {
        module: quantize_groups_as_reference(scaled.pop(f"{module}.weight"), group_size) for module in names.LINEARS
    }
    return QuantizedLayer(tensors=scaled, codes=codes, smoothing=smoothing, report=report)


def round_layer(tensors: Mapping[str, Tensor], *, group_size: int, symmetric: bool) -> QuantizedLayer:
    """Every linear rounded to the nearest codes, everything else as it is."""
    codes = {
        module: quantize_groups(tensors[f"{module}.weight"].float(), group_size, symmetric=symmetric)
        for module in names.LINEARS
    }
    return QuantizedLayer(tensors=_stored(tensors), codes=codes)


def quantize_by_search(
    tensors: Mapping[str, Tensor], inputs: Inputs, config: ModelConfig, method: Method, workers: Workers
) -> QuantizedLayer:
    """Pair by pair: measure the inputs, choose a scale, quantize, and go on with what that made of the layer.

    `tensors` are where the work is to be done, and `inputs` tells what a pair's linears read in the layer as it is so
    far (`LayerWalk.inputs`). The scale of v_proj and o_proj is one per V channel, shared by the query heads that read
    it, so it is exact under grouped-query attention too.
    """
    so_far = {name: tensor.float() for name, tensor in tensors.items()}
    done = QuantizedLayer(tensors=_stored({n: t for n, t in so_far.items() if not _is_linear(n)}), codes={})
    for pair in ORDER:
        seen = inputs(pair, so_far)
        weights = [so_far[f"{module}.weight"] for module in pair.after]
        tried = _candidates(so_far, weights, seen["gram"].diagonal() / seen["tokens"], pair, config, method)
        chosen = quantize_linears(weights, seen, tried, method, workers)
        scale = chosen.candidate.scale
        done.codes |= dict(zip(pair.after, chosen.codes, strict=True))
        if pair.before in names.NORMS:
            done.tensors |= {name: t.to(STORED) for name, t in divide_outputs(so_far, pair.before, scale).items()}
            so_far |= {name: done.tensors[name].float() for name in (f"{pair.before}.weight",)}
            so_far |= {f"{m}.weight": codes.dequantize() for m, codes in zip(pair.after, chosen.codes, strict=True)}
        else:
            # What the pair's linears read has been computed already, undivided: the walk goes on with that.
            divisor = fold_heads(scale, config)[0] if pair is ATTENTION_OUT else scale
            done.codes[pair.before] = done.codes[pair.before].divided(divisor)
            done.smoothing[pair.before] = divisor
            if (bias := so_far.get(f"{pair.before}.bias")) is not None:
                done.tensors[f"{pair.before}.bias"] = (bias / divisor).to(STORED)
            so_far |= {
                f"{module}.weight": codes.dequantize() / scale
                for module, codes in zip(pair.after, chosen.codes, strict=True)
            }
        done.report.append({"pair": pair.name, **chosen.report()})
    return done


def _candidates(
    tensors: Mapping[str, Tensor], weights: list[Tensor], power: Tensor, pair: Pair, config: ModelConfig, method: Method
) -> list[awq.Candidate]:
    """The scales of a pair that are tried; `power` [in] is the mean square of its inputs."""
    channel_weight = mean_in_group(torch.cat(weights), method.group_size)
    if pair is ATTENTION_OUT:
        power, channel_weight = fold_heads(power, config).mean(dim=0), fold_heads(channel_weight, config).mean(dim=0)

    def storable(scale: Tensor) -> Tensor:
        if pair is ATTENTION_OUT:
            return repeat_heads(scale, config)
        if pair.before in names.NORMS:
            return norm_quotient(tensors[f"{pair.before}.weight"], scale, STORED)
        return scale

    return awq.candidates(power.clamp(min=0).sqrt(), channel_weight, method.exponents, storable)


def _stored(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor.to(STORED) for name, tensor in tensors.items() if not _is_linear(name)}


def _is_linear(name: str) -> bool:
    module, _, part = name.rpartition(".")
    return part == "weight" and module in names.LINEARS
