"""Whether a source's weights are quantized already, told by its config.json alone. No torch."""

from __future__ import annotations

from pathlib import Path

from engine.models.quantization import check_source
from engine.storage.json_file import read_object


def check_weights(folder: Path, weights: str) -> None:
    """ValueError where `weights` does not go with a checkpoint folder: as_is with quantized ones, others with the rest.

    A config.json that is damaged or not there is left to whoever reads the checkpoint.
    """
    try:
        hf_config = read_object(folder / "config.json")
    except (OSError, ValueError):
        return
    try:
        check_source(hf_config, weights, folder)
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
