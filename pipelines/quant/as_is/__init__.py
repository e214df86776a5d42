"""The recipe of weights that are quantized already: they are taken from the checkpoint as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.turbomind_files import check_fits
from pipelines.slices import write_json


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
    """Look at everything that `shard` will take from the checkpoint `source`, and write `report.json` into `out`.

    Codes and zero points are taken bit by bit. Scales of int4 are stored in float16: the report counts those that
    float16 does not hold exactly (of a bfloat16 or float32 checkpoint, below 2^-14), and the largest relative error
    among them. Those of int8 are stored in float32, which holds them all. ValueError for scales that are not finite as
    they are stored, for negative ones of int8, and for a model that does not fit int4 files.
    """
    checkpoint = Checkpoint(source, allow_bin=allow_bin, allow_quantized=True)
    check_fits(checkpoint.config, checkpoint.recipe, tp=1)
    count, rounded, error = 0, 0, 0.0
    for name in checkpoint.names():
        if name.endswith(".scales"):
            scales = checkpoint.tensor(name)
            inexact, largest = _lost(name, scales)
            count, rounded, error = count + scales.numel(), rounded + inexact, max(error, largest)
        elif name.endswith(f".{names.WEIGHT_SCALE}"):
            scales = checkpoint.tensor(name)
            if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
                raise ValueError(f"{name} of {source} has values that are negative or not finite: these are no scales")
            count += scales.numel()
    assert checkpoint.quantization is not None  # `quantize` has checked it
    write_json(
        out / "report.json",
        {
            "format": checkpoint.quantization.method,
            "group_size": checkpoint.quantization.group_size,
            "scales": count,
            "rounded_scales": rounded,
            "largest_relative_error": error,
        },
    )


def _lost(name: str, scales: Tensor) -> tuple[int, float]:
    """How many scales float16 does not hold, and the largest relative error."""
    stored = scales.half()
    if not bool(stored.isfinite().all()):
        raise ValueError(
            f"{name} has scales that are not finite in float16 (largest {scales.abs().max().item():g}), which the int4 "
            "files of a TurboMind workspace store them in"
        )
    wrong = stored.double() != scales.double()
    if not bool(wrong.any()):
        return 0, 0.0
    exact, kept = scales.double()[wrong], stored.double()[wrong]
    return int(wrong.sum()), float(((kept - exact) / exact).abs().max())
