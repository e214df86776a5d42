"""`added_tokens_decoder` of tokenizer_config.json: tokens beside the vocabulary, by id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.wording import shown

SETTINGS = "tokenizer_config.json"
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """Names and meanings are those of Hugging Face's tokenizers."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


def read_added_tokens(settings: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """The tokens in the order of their ids; ValueError naming the file for one that has no id or no text."""
    entries = settings.get("added_tokens_decoder") or {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"{folder / SETTINGS} has added_tokens_decoder = {shown(entries)}: it must map ids to tokens")
    found: dict[int, AddedToken] = {}
    for key, entry in entries.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else LARGEST_ID + 1
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if token_id > LARGEST_ID or not isinstance(content, str) or not content:
            raise ValueError(
                f"{folder / SETTINGS} adds the token {shown(entry)} with the id {shown(key)}: an id is a whole number "
                f"up to {LARGEST_ID}, and a token has a `content` that is not empty"
            )
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        found[token_id] = AddedToken(content=content, **{flag: bool(entry.get(flag, False)) for flag in flags})
    return dict(sorted(found.items()))
