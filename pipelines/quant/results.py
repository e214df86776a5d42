"""What comes of quantized layers: as one that is kept while others are worked on, and as the files of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.models import names
from pipelines.quant.resume import LayerResult
from pipelines.quant.tensor_file import Plan, TensorFile
from pipelines.slices import write_json

SMOOTHING = "smoothing/"  # before the names of scales, among the tensors of a layer


def layer_result(
    packed: Mapping[str, Tensor], smoothing: Mapping[str, Tensor], report: list[dict[str, Any]]
) -> LayerResult:
    """One layer's tensors as they are stored, the scales that linears' outputs were divided by, and its report."""
    scales = {f"{SMOOTHING}{module}": scale for module, scale in smoothing.items()}
    return LayerResult(tensors={**packed, **scales}, rows=report)


def write_results(
    layers: Iterator[tuple[int, LayerResult]], within: Plan, out: Path, *, count: int, weights: Mapping[str, Any]
) -> None:
    """Write each of `count` layers as it comes, and what is said of all of them, into the folder `out`.

    `weights.safetensors`: the tensors of the layers, of which each has those of the plan `within`, by full name.
    `smoothing.safetensors`: float32 [channels] that the outputs of a linear were divided by, by its name.
    `report.json`: `weights`, and a row per layer and pair.
    """
    plan = {names.layer_name(layer, name): planned for layer in range(count) for name, planned in within.items()}
    smoothing: dict[str, Tensor] = {}
    report: list[dict[str, Any]] = []
    with TensorFile(out / "weights.safetensors", plan) as file:
        for number, layer in tqdm(layers, total=count, desc="quantize", unit="layer", file=sys.stderr, disable=None):
            for name, tensor in layer.tensors.items():
                if name.startswith(SMOOTHING):
                    smoothing[names.layer_name(number, name.removeprefix(SMOOTHING))] = tensor
                else:
                    file.write(names.layer_name(number, name), tensor.cpu())
            report += [{"layer": number, **row} for row in layer.rows]
    save_file({name: scale.cpu().contiguous() for name, scale in smoothing.items()}, out / "smoothing.safetensors")
    write_json(out / "report.json", {"weights": dict(weights), "pairs": report})
