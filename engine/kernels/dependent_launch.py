# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits only before it reads from it.

Every kernel here lets its successor start at once and waits itself before its first read of what another kernel wrote
and before its first write. Weights never change, so they are fetched before that wait.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from engine.kernels.device import Device


def options(device: Device) -> dict[str, Any]:
    """What a launch adds for a device: its kernel's PDL, and Triton's option where the device has it."""
    return {"PDL": True, "launch_pdl": True} if device.pdl else {"PDL": False}


@triton.jit
def prefetch(pointers):
    """Asks for the 128-byte lines of `pointers` in the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def depend():
    """Lets the next kernel start and waits until the one before has written what it writes."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
