"""How large a KV cache is to be, as `cache_max_entry_count` says it: a share, a number of pages, or memory.

The deviation from TurboMind v0.1.0: there a share is of the device's total memory, so that a large model leaves no room
for it; here it is of what is free once the weights are loaded. An amount of memory is ours.
"""

from __future__ import annotations

import math
import re

CacheSize = float | str
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
CACHE_SIZES = (
    "a share of the free memory (below 1), a whole number of pages (from 1 on), or an amount of memory such as 512MB "
    "or 4GB (MB, GB: powers of 1000; MiB, GiB: of 1024)"
)


def is_cache_size(size: object) -> bool:
    """Whether a value, of whatever type, is one of CACHE_SIZES."""
    if isinstance(size, str):
        return memory_bytes(size) > 0
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < math.inf:
        return False
    return size < 1 or size == int(size)


def memory_bytes(amount: str) -> int:
    """The bytes of an amount such as "4GB" or "1.5 GiB"; 0 for a text that is no amount."""
    found = re.fullmatch(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?) ?({'|'.join(UNITS)})", amount)
    return round(float(found[1]) * UNITS[found[2]]) if found else 0


def num_pages(size: CacheSize, *, page_bytes: int, free_bytes: int) -> int:
    """The pages that `size` buys on a device with `free_bytes`; ValueError for what is no size."""
    if not is_cache_size(size):
        raise ValueError(f"cache_max_entry_count is {size!r}, but must be {CACHE_SIZES}.")
    if isinstance(size, str):
        return memory_bytes(size) // page_bytes
    return int(size) if size >= 1 else int(free_bytes * size) // page_bytes
