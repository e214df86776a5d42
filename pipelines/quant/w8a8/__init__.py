"""W8A8 by SmoothQuant: linear layers in int8, a scale an output, multiplied with int8 rows; the rest in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.turbomind_files import check_fits, float_type
from pipelines.quant.observers import Observer, some_rows
from pipelines.quant.results import layer_result, write_results
from pipelines.quant.resume import LayerResult, Resume
from pipelines.quant.stream import LayerTensors, Stream, Workers, side_by_side
from pipelines.quant.tensor_file import Plan
from pipelines.quant.w8a8.layer import quantize_as_reference, quantize_by_search

RECIPE = Recipe(weights="w8a8")
# Tokens on which scales are compared: at most so many, but one of every block.
TOKENS = 2048


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

    `weights` is the slice's part of that name and `calibration` the folder of a finished calibration. Linears are
    `weight` int8 [out, in] and `weight_scale` float32 [out], norms and biases of the type of the workspace's floats.
    With `search: grid` a linear's inputs are those of the unquantized model, and the errors reported are parts of the
    power of the outputs. With `rotate_down` down_proj's weight is that of inputs that are rotated by blocks of so many
    channels. In the folder `unfinished` layers are kept as they are done, and those found there are not computed again.
    """
    checkpoint = Checkpoint(source, allow_bin=allow_bin)
    config = checkpoint.config
    rotated = weights.get("rotate_down", 0)
    check_fits(config, replace(RECIPE, rotate_down=rotated), tp=1)  # before any work
    with side_by_side(device=device) as workers:
        stream: Stream | None = None
        if weights["search"] == "none":
            one = _by_formula(checkpoint, calibration / "stats.safetensors", float(weights["alpha"]))
        else:
            blocks = load_file(calibration / "blocks.safetensors")["tokens"]
            stream = Stream(checkpoint, blocks, workers, device=device)
            alphas = [float(alpha) for alpha in weights["alphas"]]
            one = _searched(checkpoint, stream, alphas, workers, rotated=rotated)
        layers = Resume(unfinished, count=config.num_layers, state=stream).results(one)
        write_results(layers, _plan(config), out, count=config.num_layers, weights=weights)


def _searched(
    checkpoint: Checkpoint, stream: Stream, alphas: list[float], workers: Workers, *, rotated: int
) -> Callable[[int], LayerResult]:
    dtype = float_type(checkpoint.config, RECIPE)

    def observer() -> Observer:
        return Observer(of_input=lambda x: some_rows(x, max(TOKENS // len(stream.hidden), 1)), of_kv=None)

    def one(number: int) -> LayerResult:
        tensors = dict(LayerTensors(checkpoint, number, stream.device))
        seen = stream.observe(stream.dense(tensors), number, observer, advance=True)
        done = quantize_by_search(
            tensors, seen, checkpoint.config, alphas=alphas, dtype=dtype, workers=workers, rotated=rotated
        )
        return layer_result(done.packed(), done.smoothing, done.report)

    return one


def _by_formula(checkpoint: Checkpoint, statistics: Path, alpha: float) -> Callable[[int], LayerResult]:
    dtype = float_type(checkpoint.config, RECIPE)

    def one(number: int) -> LayerResult:
        with safe_open(statistics, framework="pt") as opened:
            absmax: dict[str, Tensor] = {
                module: opened.get_tensor(f"inputs/absmax/{names.layer_name(number, module)}")
                for module in names.LINEARS
            }
        tensors = LayerTensors(checkpoint, number)
        done = quantize_as_reference(tensors, absmax, checkpoint.config, alpha=alpha, dtype=dtype)
        return layer_result(done.packed(), done.smoothing, done.report)

    return one


def _plan(config: ModelConfig) -> Plan:
    within: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in names.layer_tensors(config).items():
        module, _, part = name.rpartition(".")
        if module in names.LINEARS and part == "weight":
            within[name] = (torch.int8, shape)
            within[f"{module}.{names.WEIGHT_SCALE}"] = (torch.float32, shape[:1])
        else:
            within[name] = (float_type(config, RECIPE), shape)
    return within
