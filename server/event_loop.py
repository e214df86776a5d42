"""What runs the server, and what measures it: uvloop where it is installed (Linux), else asyncio's own loop."""

from __future__ import annotations

try:
    from uvloop import run
except ImportError:
    from asyncio import run  # type: ignore[assignment]

__all__ = ["run"]
