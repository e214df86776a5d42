"""What every Triton kernel here is launched with, and the numbers that they share."""

from __future__ import annotations

import os

import torch
import triton.language as tl

# 1.5 * 2^23: added to a float32 of magnitude below 2^22 and taken away, it rounds halves to even.
ROUNDER = tl.constexpr(12582912.0)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def dependent_launch() -> bool:
    """Whether kernels may start while the one before them drains (programmatic dependent launch, from Hopper on).

    A kernel that is launched so reads nothing that a kernel before it wrote until `gdc_wait`.
    """
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


_PDL = dependent_launch()
# `pdl` is the kernels' own switch; `launch_pdl` is the launcher's.
LAUNCH = {"pdl": True, "launch_pdl": True} if _PDL else {"pdl": False}


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
