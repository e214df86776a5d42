"""The recipe that quantizes nothing: the weights stay where they are, in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    """Nothing to write: whatever reads the quantized model reads the checkpoint's own tensors."""
