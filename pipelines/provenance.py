"""How an artifact was built: the slices of the stages that make it, the digests of their code, and the toolchain.

A slice is all that its stage needs beside its inputs, so these build the artifact again without conf/ and params.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.slices import read_slice
from pipelines.toolchain import toolchain

FORMAT = 1
STAGES = ("calibrate", "quantize", "shard", "export")  # in the order in which they run


def stage_keys(key: str) -> dict[str, str]:
    """The key of each stage's instance that has a part in the artifact `model-calibration-weights-tp-kv`."""
    names = key.split("-")
    return {stage: "-".join(names[:count]) for stage, count in zip(STAGES, (2, 3, 4, 5), strict=True)}


def provenance(slices: Path, key: str) -> dict[str, Any]:
    """What the store keeps of how the artifact `key` was built: {format, key, slices, code, toolchain}.

    `slices` is the folder that compose wrote. FileNotFoundError where it does not hold what the artifact is made of.
    """
    keys = stage_keys(key)
    found = {stage: read_slice(slices / stage / f"{name}.json") for stage, name in keys.items()}
    weights = keys["quantize"].rpartition("-")[2]
    code: dict[str, str] = {}
    for stage in STAGES:
        code |= read_slice(slices / "code" / f"{f'quantize-{weights}' if stage == 'quantize' else stage}.json")
    return {"format": FORMAT, "key": key, "slices": found, "code": code, "toolchain": toolchain()}
