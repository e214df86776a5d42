"""W4A16: linear layers as 4-bit groups; everything else stays in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.turbomind_files import check_fits
from pipelines.quant.results import layer_result, write_results
from pipelines.quant.resume import LayerResult, Resume
from pipelines.quant.stream import LayerTensors, Workers, side_by_side
from pipelines.quant.tensor_file import Plan
from pipelines.quant.w4a16.head import quantize_head
from pipelines.quant.w4a16.layer import QuantizedLayer, quantize_as_reference, quantize_by_search, round_layer
from pipelines.quant.w4a16.search import Method
from pipelines.quant.walk import Walk


@torch.inference_mode()
def quantize(
    weights: Mapping[str, Any],
    source: Path,
    calibration: Path,
    out: Path,
    *,
    allow_bin: bool = False,
    device: str = "cpu",
    unfinished: Path | None = None,
) -> None:
    """Write the quantized layers of the checkpoint `source` into the folder `out` (`write_results`).

    `weights` is the slice's part of that name and `calibration` the folder of a finished calibration. Linears are in
    the HF-AWQ layout, norms and biases in float16. With `search: grid` a linear sees the outputs of the quantized ones
    before it, and the errors reported are parts of the power of the outputs. In the folder `unfinished` layers are kept
    as they are done, and those found there are not computed again.
    """
    checkpoint = Checkpoint(source, allow_bin=allow_bin)
    config, group_size = checkpoint.config, int(weights["group_size"])
    head = str(weights.get("head", "fp16"))
    check_fits(config, Recipe(weights="w4a16", group_size=group_size, head=head), tp=1)  # before any work
    with side_by_side(device=device) as workers:
        walk: Walk | None = None
        if weights["search"] == "none":
            one = _by_formula(checkpoint, calibration / "stats.safetensors", group_size, float(weights["alpha"]))
        elif weights["method"] == "rtn":
            one = _rounded(checkpoint, weights, device)
        else:
            blocks = load_file(calibration / "blocks.safetensors")["tokens"]
            walk, one = _searched(checkpoint, blocks, method(weights), workers, device)
        layers = Resume(unfinished, count=config.num_layers, state=walk).results(one)
        write_results(layers, _plan(config, group_size), out, count=config.num_layers, weights=weights)
        asked = method(weights) if walk is not None else None
        quantize_head(checkpoint, weights, out, walk=walk, method=asked, device=device)


def method(weights: Mapping[str, Any]) -> Method:
    """What a slice with `search: grid` asks for; a field that its method does not have is not in it."""
    return Method(
        group_size=int(weights["group_size"]),
        symmetric=bool(weights["symmetric"]),
        feedback="gptq" in weights["method"],
        clip=bool(weights["clip"]),
        correction=float(weights.get("correction", 0.0)),
        exponents=tuple(
            (float(x), float(y))
            for x in weights.get("activation_exponents", ())
            for y in weights.get("weight_exponents", ())
        ),
    )


def _result(layer: QuantizedLayer) -> LayerResult:
    return layer_result(layer.packed(), layer.smoothing, layer.report)


def _searched(
    checkpoint: Checkpoint, blocks: Tensor, method: Method, workers: Workers, device: str
) -> tuple[Walk, Callable[[int], LayerResult]]:
    walk = Walk(checkpoint, blocks, workers, drift=method.correction > 0, device=device)

    def one(number: int) -> LayerResult:
        tensors = dict(LayerTensors(checkpoint, number, device))
        here = walk.layer(number, tensors)
        quantized = quantize_by_search(tensors, here.inputs, checkpoint.config, method, workers)
        here.finish(quantized.dense(), quantized.smoothing)
        return _result(quantized)

    return walk, one


def _rounded(checkpoint: Checkpoint, weights: Mapping[str, Any], device: str) -> Callable[[int], LayerResult]:
    def one(number: int) -> LayerResult:
        tensors = LayerTensors(checkpoint, number, device)
        group_size, symmetric = int(weights["group_size"]), bool(weights["symmetric"])
        return _result(round_layer(tensors, group_size=group_size, symmetric=symmetric))

    return one


def _by_formula(
    checkpoint: Checkpoint, statistics: Path, group_size: int, alpha: float
) -> Callable[[int], LayerResult]:
    def one(number: int) -> LayerResult:
        with safe_open(statistics, framework="pt") as opened:
            absmax = {
                module: opened.get_tensor(f"inputs/absmax/{names.layer_name(number, module)}")
                for module in names.LINEARS
            }
        tensors = LayerTensors(checkpoint, number)
        return _result(quantize_as_reference(tensors, absmax, checkpoint.config, group_size=group_size, alpha=alpha))

    return one


def _plan(config: ModelConfig, group_size: int) -> Plan:
    within: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in names.layer_tensors(config).items():
        module, _, part = name.rpartition(".")
        if module not in names.LINEARS or part != "weight":
            within[name] = (torch.float16, shape)
            continue
        outputs, inputs = shape
        within[f"{module}.qweight"] = (torch.int32, (inputs, outputs // 8))
        within[f"{module}.qzeros"] = (torch.int32, (inputs // group_size, outputs // 8))
        within[f"{module}.scales"] = (torch.float16, (inputs // group_size, outputs))
    return within
