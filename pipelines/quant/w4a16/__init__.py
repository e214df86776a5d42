"""W4A16: linear layers as 4-bit groups with activation-aware scales; everything else stays in 16 bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.turbomind_files import check_fits
from pipelines.quant.observers import Observer, gram
from pipelines.quant.stream import LayerTensors, Stream, Workers, side_by_side
from pipelines.quant.tensor_file import TensorFile
from pipelines.quant.w4a16.layer import QuantizedLayer, quantize_as_reference, quantize_by_search
from pipelines.slices import write_json


@torch.inference_mode()
def quantize(
    weights: Mapping[str, Any], source: Path, calibration: Path, out: Path, *, allow_bin: bool = False
) -> None:
    """Write the quantized layers of the checkpoint `source` into the folder `out`.

    `weights` is the slice's part of that name and `calibration` the folder of a finished calibration.

    `weights.safetensors`: every tensor of every decoder layer, linears in the HF-AWQ layout, norms and biases in
    float16. `smoothing.safetensors`: float32 [channels] that the outputs of a linear were divided by, by its name.
    `report.json`: a row per layer and pair. With `search: grid` a layer sees the outputs of the quantized ones before
    it, and the errors reported are parts of the power of the outputs.
    """
    checkpoint = Checkpoint(source, allow_bin=allow_bin)
    config, group_size = checkpoint.config, int(weights["group_size"])
    check_fits(config, Recipe(weights="w4a16", group_size=group_size), tp=1)  # before any work
    with side_by_side() as workers:
        if weights["search"] == "grid":
            blocks = load_file(calibration / "blocks.safetensors")["tokens"]
            layers = _searched(checkpoint, blocks, group_size, exponent_grid(weights), workers)
        else:
            layers = _by_formula(checkpoint, calibration / "stats.safetensors", group_size, float(weights["alpha"]))
        smoothing, report = _write_layers(layers, config, group_size, out / "weights.safetensors")
    save_file({name: scale.contiguous() for name, scale in smoothing.items()}, out / "smoothing.safetensors")
    write_json(out / "report.json", {"group_size": group_size, "search": weights["search"], "pairs": report})


def _write_layers(
    layers: Iterator[QuantizedLayer], config: ModelConfig, group_size: int, path: Path
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Write each layer as it comes; returns the smoothing scales by full name and the report's rows."""
    smoothing: dict[str, Tensor] = {}
    report: list[dict[str, Any]] = []
    with TensorFile(path, _plan(config, group_size)) as file:
        progress = tqdm(layers, total=config.num_layers, desc="quantize", unit="layer", file=sys.stderr, disable=None)
        for number, layer in enumerate(progress):
            for name, tensor in layer.packed().items():
                file.write(names.layer_name(number, name), tensor)
            smoothing |= {names.layer_name(number, module): scale for module, scale in layer.smoothing.items()}
            report += [{"layer": number, **row} for row in layer.report]
    return smoothing, report


def exponent_grid(weights: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The exponents (of the activation, of the weight) that a slice asks to try: x in [0, 1), y in [0, 1]."""
    steps, weight_steps = int(weights["activation_steps"]), int(weights["weight_steps"])
    return [(x / steps, y / max(weight_steps - 1, 1)) for x in range(steps) for y in range(weight_steps)]


def _searched(
    checkpoint: Checkpoint,
    blocks: Tensor,
    group_size: int,
    exponents: list[tuple[float, float]],
    workers: Workers,
) -> Iterator[QuantizedLayer]:
    stream = Stream(checkpoint, blocks, workers)
    for number in range(checkpoint.config.num_layers):
        tensors = LayerTensors(checkpoint, number)
        grams = stream.observe(
            stream.dense(tensors), number, lambda: Observer(of_input=gram, of_kv=None), advance=False
        )
        quantized = quantize_by_search(
            tensors, grams, checkpoint.config, group_size=group_size, exponents=exponents, workers=workers
        )
        stream.advance(stream.dense(quantized.dense()))
        yield quantized


def _by_formula(checkpoint: Checkpoint, statistics: Path, group_size: int, alpha: float) -> Iterator[QuantizedLayer]:
    for number in range(checkpoint.config.num_layers):
        with safe_open(statistics, framework="pt") as opened:
            absmax = {
                module: opened.get_tensor(f"inputs/absmax/{names.layer_name(number, module)}")
                for module in names.LINEARS
            }
        yield quantize_as_reference(
            LayerTensors(checkpoint, number), absmax, checkpoint.config, group_size=group_size, alpha=alpha
        )


def _plan(config: ModelConfig, group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
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
    return {
        names.layer_name(layer, name): planned for layer in range(config.num_layers) for name, planned in within.items()
    }
