"""The output matrix in 8 or 4 bits, after the layers: `head.safetensors` (storage/head_files.py) and `head.json`.

int4 is quantized as the layers are, against the Gram matrix of what it will read: the final norm's outputs behind the
quantized layers. No scale is tried: rows of the vocabulary that calibration never saw are read too. int8, a scale a
row, is rounded to nearest, as the engine rounds the activations that it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import Recipe
from engine.kernels import reference as ops
from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.head_files import MODULE, head_tensors, padded_outputs
from pipelines.quant.observers import Statistics, gram, gram_and_drift
from pipelines.quant.stream import Joined
from pipelines.quant.w4a16.awq import Candidate
from pipelines.quant.w4a16.pack import pack_codes
from pipelines.quant.w4a16.rounding import quantize_groups
from pipelines.quant.w4a16.search import Method, quantize_linears
from pipelines.quant.walk import Walk
from pipelines.slices import write_json

ROWS = 8192
"""Rows of the vocabulary that are in memory as float32 at a time: rows do not know of each other."""
HEAD_FILE = "head.safetensors"


def quantize_head(
    checkpoint: Checkpoint,
    weights: Mapping[str, Any],
    out: Path,
    *,
    walk: Walk | None = None,
    method: Method | None = None,
    device: str = "cpu",
) -> None:
    """Write the head that `weights` asks for into `out`; of fp16 there is nothing to write.

    `walk` has come to the end of the layers. Without it and its `method` int4 is rounded to nearest. A tied head is
    quantized as a matrix of its own, and the embedding stays. ValueError for a weight that is not finite.
    """
    head = weights.get("head", "fp16")
    if head == "fp16":
        return
    recipe = Recipe(weights="w4a16", group_size=int(weights["group_size"]), head=head)
    matrix = checkpoint.tensor(names.HEAD)
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{names.HEAD} of {checkpoint.folder} has NaN or Inf values: the checkpoint is damaged.")
    seen = None if walk is None or head == "int8" else _statistics(checkpoint, walk, device)
    lost, power, parts = 0.0, 0.0, []
    for some in torch.split(_padded(matrix, checkpoint) if head == "int4" else matrix, ROWS):
        rows = some.to(device).float()
        if head == "int8":
            codes, scales = ops.quantize_rows(rows)
            parts.append({"weight": codes.cpu(), names.WEIGHT_SCALE: scales.cpu()})
        elif seen is None or walk is None or method is None:
            rounded = quantize_groups(rows, recipe.group_size, symmetric=bool(weights.get("symmetric", False)))
            parts.append(pack_codes(rounded))
        else:
            plain = Candidate(x=0.0, y=0.0, scale=torch.ones(rows.shape[1], device=rows.device))
            chosen = quantize_linears([rows], seen, [plain], method, walk.stream.workers)
            share = float(((rows @ (seen["gram"] / seen["tokens"])) * rows).sum())
            lost, power = lost + chosen.error * share, power + share
            parts.append(pack_codes(chosen.codes[0]))
    along = 0 if head == "int8" else 1
    planned = head_tensors(checkpoint.config, recipe)
    found = {f"{MODULE}.{kind}": torch.cat([part[kind].cpu() for part in parts], dim=along) for kind in parts[0]}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == planned
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out / HEAD_FILE)
    write_json(out / "head.json", {"head": head, "error": lost / power if power else None})


def _padded(matrix: Tensor, checkpoint: Checkpoint) -> Tensor:
    missing = padded_outputs(checkpoint.config) - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])]) if missing else matrix


def _statistics(checkpoint: Checkpoint, walk: Walk, device: str) -> Statistics:
    """What the head reads, summed over the samples as inputs within a layer are."""
    stream, eps = walk.stream, checkpoint.config.norm_eps
    norm = checkpoint.tensor(names.FINAL_NORM).to(device, stream.dtype)

    def one(sample: int) -> Statistics:
        seen = ops.rms_norm(stream.hidden[sample], norm, eps)
        if walk.unquantized is None:
            return gram(seen)
        return gram_and_drift(seen, ops.rms_norm(walk.unquantized[sample], norm, eps))

    joined = Joined()
    for statistics in stream.workers.in_order(one, len(stream.hidden)):
        joined.add(statistics)
        del statistics
    return joined.checked(checkpoint.config.num_layers, MODULE)
