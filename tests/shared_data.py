"""Where tests find the real models, texts and golden cases that are not part of the repository."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(relative: str) -> Path:
    """The path of shared data beside the checkout; skips the test, saying what is missing, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} is not in {SHARED}: this test needs the shared data beside the checkout")
    return path
