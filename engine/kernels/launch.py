# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What every Triton kernel here is launched with, and the arithmetic that they share."""

from __future__ import annotations

import os

import torch
import triton
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


@triton.jit
def round_row(x):
    """`reference.quantize_rows` of one row in float32: codes and scale."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=0), 1e-7), 127.0)
    step = tl.minimum(tl.maximum(tl.div_rn(x, scale), -127.0), 127.0)
    return ((step + ROUNDER) - ROUNDER).to(tl.int8), scale
