"""One decoder layer from float tensors to int8 ones: choose a smoothing scale per pair, apply it, round.

SmoothQuant (Xiao et al. 2023, equations 3 and 4): s = max|x|^alpha / max|w|^(1-alpha) per input channel divides the
inputs, whose large channels make int8 rows coarse, and multiplies the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import reference as ops
from engine.kernels.rotation import rotate
from engine.models import names
from pipelines.quant.observers import Statistics
from pipelines.quant.pairs import ATTENTION_OUT, MLP_OUT, PAIRS, Pair, divide_outputs, fold_heads, repeat_heads
from pipelines.quant.scales import grid_scale, norm_quotient, smooth_as_reference
from pipelines.quant.stream import Workers

Tensors = dict[str, Tensor]

ROTATED_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCodes:
    """int8 codes [out, in] of a weight and float32 scales [out]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> RowCodes:
        """Symmetric, a scale a row, rounded to nearest: what the engine does with activations (`quantize_rows`)."""
        codes, scales = ops.quantize_rows(weight)
        return cls(codes=codes, scales=scales)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scales.unsqueeze(-1)

    def divided(self, divisor: Tensor) -> RowCodes:
        """The codes of the weight whose output j is divided by divisor[j]."""
        return RowCodes(codes=self.codes, scales=self.scales / divisor)


@dataclass(slots=True, kw_only=True)
class QuantizedLayer:
    """A layer's result, names within the layer.

    `tensors` are those that stay floats (norms, biases), `codes` the linears, `smoothing` the scale [channels] that
    the outputs of a linear were divided by, and `report` has a row per pair.
    """

    tensors: Tensors
    codes: dict[str, RowCodes] = field(default_factory=dict)
    smoothing: Tensors = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)

    def packed(self) -> Tensors:
        """The tensors as they are stored."""
        weights = {f"{module}.weight": codes.codes for module, codes in self.codes.items()}
        scales = {f"{module}.{names.WEIGHT_SCALE}": codes.scales for module, codes in self.codes.items()}
        return weights | scales | self.tensors


def quantize_as_reference(
    tensors: Mapping[str, Tensor],
    absmax: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    alpha: float,
    dtype: torch.dtype,
) -> QuantizedLayer:
    """LMDeploy's `smooth_quant` of one layer, in the arithmetic of `dtype`; `absmax` [in] by linear."""
    scaled, smoothing, report = smooth_as_reference(tensors, absmax, config, group_size=None, alpha=alpha, dtype=dtype)
    codes = {module: RowCodes.of(scaled.pop(f"{module}.weight")) for module in names.LINEARS}
    return QuantizedLayer(tensors=scaled, codes=codes, smoothing=smoothing, report=report)


def quantize_by_search(
    tensors: Mapping[str, Tensor],
    seen: Mapping[str, Statistics],
    config: ModelConfig,
    *,
    alphas: Sequence[float],
    dtype: torch.dtype,
    workers: Workers,
    rotated: int = 0,
) -> QuantizedLayer:
    """For each pair the alpha that leaves the least error of its outputs, or no smoothing where none leaves less.

    `seen` has for the input of each linear its `absmax` [in] and some of its `rows` [n, in]. Floats are stored in
    `dtype`. The scale of v_proj and o_proj is one per V channel, shared by the query heads that read it, so it is exact
    under grouped-query attention too. down_proj's weight is that of inputs `rotated` by blocks of so many channels.
    """
    floats = {name: tensors[name].to(dtype) for name in tensors if not _is_linear(name)}
    done = QuantizedLayer(tensors=floats)
    for pair in PAIRS:
        weights = [tensors[f"{module}.weight"].float() for module in pair.after]
        norm = tensors[f"{pair.before}.weight"].float() if pair.before in names.NORMS else None
        tried = _scales(weights, seen[pair.after[0]]["absmax"], norm, pair, config, alphas=alphas, dtype=dtype)
        block = rotated if pair is MLP_OUT else 0
        chosen, scale, errors = _best(weights, seen[pair.after[0]]["rows"], tried, workers, block)
        for module, weight in zip(pair.after, weights, strict=True):
            done.codes[module] = RowCodes.of(_smoothed(weight, scale, block))
        if norm is not None:
            done.tensors |= {f"{pair.before}.weight": (norm / scale).to(dtype)}
            # A norm of another type may have a bias of its own one day: then this line is not enough, and says so.
            assert f"{pair.before}.bias" not in tensors
        else:
            divisor = fold_heads(scale, config)[0] if pair is ATTENTION_OUT else scale
            done.codes[pair.before] = done.codes[pair.before].divided(divisor)
            done.smoothing[pair.before] = divisor
            biases = {name: tensor for name, tensor in tensors.items() if name == f"{pair.before}.bias"}
            done.tensors |= {n: t.to(dtype) for n, t in divide_outputs(biases, pair.before, divisor).items()}
        done.report.append({"pair": pair.name, "alpha": chosen, "error_unsmoothed": errors[0], "error": min(errors)})
    return done


def _scales(
    weights: Sequence[Tensor],
    absmax: Tensor,
    norm: Tensor | None,
    pair: Pair,
    config: ModelConfig,
    *,
    alphas: Sequence[float],
    dtype: torch.dtype,
) -> list[tuple[float | None, Tensor]]:
    """(alpha, float32 scale [in]) to try, no smoothing first: scales that can be had exactly."""
    largest = torch.cat(list(weights)).abs().amax(dim=0)
    if pair is ATTENTION_OUT:
        absmax, largest = fold_heads(absmax, config).amax(dim=0), fold_heads(largest, config).amax(dim=0)

    def exact(scale: Tensor) -> Tensor:
        if norm is not None:
            return norm_quotient(norm, scale, dtype)
        return repeat_heads(scale, config) if pair is ATTENTION_OUT else scale

    tried: list[tuple[float | None, Tensor]] = [(None, exact(torch.ones_like(absmax)))]
    return tried + [(alpha, exact(grid_scale(absmax, largest, alpha, 1 - alpha))) for alpha in alphas]


def _best(
    weights: Sequence[Tensor],
    rows: Tensor,
    tried: Sequence[tuple[float | None, Tensor]],
    workers: Workers,
    block: int = 0,
) -> tuple[float | None, Tensor, list[float]]:
    """The first of the scales with the least error, its alpha, and all errors in parts of the outputs' power.

    The linears are run as the engine runs them, with int8 rows, rotated by `block` channels, and compared with the
    floats' outputs.
    """
    wanted = [rows @ weight.t() for weight in weights]
    power = sum(float(outputs.square().sum()) for outputs in wanted) or 1.0

    def error(index: int) -> float:
        scale, left = tried[index][1], 0.0
        codes, row_scales = ops.quantize_rows(rotate(rows / scale, block))
        for weight, outputs in zip(weights, wanted, strict=True):
            rounded = ops.quantize_rows(_smoothed(weight, scale, block))
            out = ops.int8_linear(codes, row_scales, *rounded, None, torch.float32)
            left += float((out - outputs).square().sum())
        return left / power

    errors = list(workers.in_order(error, len(tried)))
    alpha, scale = tried[min(range(len(errors)), key=errors.__getitem__)]
    return alpha, scale, errors


def _smoothed(weight: Tensor, scale: Tensor, block: int) -> Tensor:
    """The weight [out, in] of inputs that are divided by `scale` [in] and then rotated, rounded once."""
    if not block:
        return weight * scale
    # Some rows at a time: float64 takes twice the memory of what there is.
    parts = (rotate(rows.double() * scale, block).float() for rows in torch.split(weight, ROTATED_ROWS))
    return torch.cat(list(parts))


def _is_linear(name: str) -> bool:
    module, _, part = name.rpartition(".")
    return part == "weight" and module in names.LINEARS
