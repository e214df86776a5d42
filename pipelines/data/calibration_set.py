"""The blocks of a slice's calibration, drawn from one text or from the parts of a mixture, and what they are."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.runtime.tokenizer import Tokenizer
from pipelines.data.blocks import token_blocks
from pipelines.data.conversations import render_conversations
from pipelines.data.mixture import shares
from pipelines.data.reference_sampling import reference_blocks
from pipelines.data.texts import read_documents, read_rows
from pipelines.slices import locate
from pipelines.sources import identity, tokenizer_digest

WHOLE = "text"
"""The name of the only text of a calibration without parts."""


def calibration_set(
    calibration: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    locate: Callable[[Mapping[str, Any]], Path] = locate,
) -> tuple[Tensor, dict[str, Any]]:
    """int32 [samples, sequence_length], part after part by name, and what calibration.json says of them.

    ValueError or FileNotFoundError names the part, the file or the option that is wrong.
    """
    parts = calibration.get("parts")
    if parts is None:
        drawn = {
            WHOLE: _blocks(calibration["text"], tokenizer, calibration, samples=calibration["samples"], locate=locate)
        }
        records = {WHOLE: calibration["text"]}
    else:
        records = {name: parts[name]["text"] for name in sorted(parts)}
        samples = shares(calibration["samples"], {name: part["weight"] for name, part in parts.items()})
        drawn = {
            name: _blocks(
                record, tokenizer, calibration, samples=samples[name], part=f"calibration.parts.{name}", locate=locate
            )
            for name, record in records.items()
        }
    blocks = torch.cat([drawn[name] for name in records])
    template = tokenizer.chat_template if any(record["kind"] == "chat" for record in records.values()) else None
    about = {
        "blocks": blocks_digest(blocks),
        "tokenizer": tokenizer_digest(tokenizer.folder),
        "template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "sources": {name: {"source": identity(record), "blocks": len(drawn[name])} for name, record in records.items()},
    }
    return blocks, about


def blocks_digest(blocks: Tensor) -> str:
    """SHA-256 over the tokens, block after block, each an int32 in little-endian."""
    return hashlib.sha256(blocks.contiguous().numpy().astype("<i4").tobytes()).hexdigest()


def _blocks(
    record: Mapping[str, Any],
    tokenizer: Tokenizer,
    calibration: Mapping[str, Any],
    *,
    samples: int,
    locate: Callable[[Mapping[str, Any]], Path],
    part: str | None = None,
) -> Tensor:
    length, sampling = calibration["sequence_length"], calibration["sampling"]
    if sampling == "reference":
        rows = read_rows(record, locate=locate)
        drawn = reference_blocks(record["name"], rows, tokenizer.encode, samples=samples, sequence_length=length)
        if len(drawn) != samples:
            print(f"calibration: the reference makes {len(drawn)} blocks of {samples} documents.", file=sys.stderr)
        return drawn
    chat = record["kind"] == "chat"
    return token_blocks(
        render_conversations(record, tokenizer, locate=locate) if chat else read_documents(record, locate=locate),
        partial(tokenizer.encode, add_special=False) if chat else tokenizer.encode,  # a template writes BOS itself
        samples=samples,
        sequence_length=length,
        sampling=sampling,
        seed=calibration.get("seed", 0),
        part=part,
    )
