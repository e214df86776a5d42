"""What can be wrong with a single field of conf/, as the sentences that `schema.check` lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> Iterator[str]:
    """A sentence where the value is none of those that are allowed."""
    if value not in allowed:
        yield f"{key}={value} must be one of {', '.join(allowed)}"


def digest(key: str, value: str | None) -> Iterator[str]:
    """A sentence where the value is given and is no SHA-256."""
    if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
        yield f"{key}={value} must be a SHA-256 (64 hexadecimal digits)"


def commit(key: str, value: str | None) -> Iterator[str]:
    """A sentence where the value is no commit."""
    if value is None or not re.fullmatch(r"[0-9a-f]{40}", value):
        yield f"{key}={value} must be a commit (40 hexadecimal digits): a branch or tag can change under a build"
