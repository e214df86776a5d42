"""What Hydra and OmegaConf say of a mistake, as one paragraph."""

from __future__ import annotations


def paragraph(error: Exception) -> str:
    """The message of a Hydra or OmegaConf error without its technical tail (search path, full_key, object_type)."""
    texts = [str(each).partition("Config search path")[0] for each in (error, error.__cause__) if each is not None]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    tails = ("full_key", "object_type", "reference_type", "See ")
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(tails)))
