"""Memory of the C library that steps on a CPU take and free again: kept by the process, not given back each time."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), as <malloc.h> of glibc numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Free memory at the end of the heap that a process may keep: several tensors of a step.
MOST_KEPT = 256 << 20
# Blocks above this are mapped and unmapped one by one; glibc takes no more.
LARGEST_IN_HEAP = 32 << 20
SWITCHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to MOST_KEPT bytes that are free; return whether it does.

    By itself it gives the end of its heap back to the system as soon as some 100 KB are free there, or twice the
    largest block that was unmapped before, and a step of a batch frees megabytes. Whether they lie at the end is an
    accident of what else the process holds, and lasts: such a process takes thousands of page faults a step. Another C
    library is left alone, and so are values that the user's environment sets.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SWITCHES):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_IN_HEAP) and mallopt(TRIM_THRESHOLD, MOST_KEPT))
