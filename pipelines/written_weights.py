"""The weight files of a workspace, written under a progress bar and handed on with the digests of what was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from engine.config import ModelConfig, Recipe
from engine.storage.artifacts import FileEntry
from engine.storage.workspace import weight_bytes, write_weights
from pipelines.slices import link, write_json

DIGESTS = "digests.json"


def write_with_bar(
    folder: Path, config: ModelConfig, tensor: Callable[[str], Tensor], *, recipe: Recipe, tp: int, title: str
) -> list[FileEntry]:
    """`write_weights`, with bytes and their speed on standard error where that is a terminal."""
    total = weight_bytes(config, recipe, tp)
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar:
        return write_weights(folder, config, tensor, recipe=recipe, tp=tp, progress=bar.update)


def keep_digests(folder: Path, entries: Iterable[FileEntry]) -> None:
    """Put the digests of the weight files beside them, for `link_weights`."""
    write_json(folder / DIGESTS, [asdict(entry) for entry in entries])


def link_weights(source: Path, target: Path, *, within: Path) -> list[FileEntry]:
    """Link the weight files of `source` into `target`/`within`; returns them as written, by their path in `target`."""
    entries = [FileEntry(**entry) for entry in json.loads((source / DIGESTS).read_text(encoding="utf-8"))]
    for entry in entries:
        link(source / entry.path, target / within / entry.path)
    return [replace(entry, path=(within / entry.path).as_posix()) for entry in entries]
