"""What the kernels want to know of the GPU that they run on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """name: as in file names of tuned tables. pdl: whether programmatic dependent launch exists (sm_90 and newer)."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def pdl(self) -> bool:
        return self.capability >= (9, 0)


# What a CPU tensor is run as: Triton's interpreter, in tests.
INTERPRETER = Device("interpreter", (0, 0), 1)


@functools.cache
def facts(device: torch.device) -> Device:
    """The facts of a CUDA device; those of the interpreter for a CPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    name = properties.name.lower().replace("nvidia", "").strip()
    return Device(
        "".join(letter if letter.isalnum() else "-" for letter in name),
        (properties.major, properties.minor),
        properties.multi_processor_count,
    )
