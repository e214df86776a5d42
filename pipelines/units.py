"""Sizes and times as people read them."""

from __future__ import annotations


def human_size(num_bytes: float) -> str:
    """Bytes in the unit that keeps the number below 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def human_time(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short; no less than a second."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
