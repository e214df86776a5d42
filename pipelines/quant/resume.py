"""Work on a model layer by layer that can be killed: what is done is kept on disk, and a later run goes on from it.

    resume = Resume(folder, count=config.num_layers, state=walk)
    for number, result in resume.results(one_layer): ...

In the folder: `<n>.results.safetensors`, what came of layer n; `<n>.state.safetensors`, what the layer after n needs,
for one n alone; and `<n>.json`, written last, with the SHA-256 of the files that it speaks for. Tensors are kept bit by
bit, so a run that was continued ends with the bytes of one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from pipelines.quant.tensor_file import TensorFile
from pipelines.sources import sha256_file

SHARE = 0.1
"""The part of the time that keeping may take: of layers that are quicker than that, only every so many is kept."""
EXPECTED_RATE = 300e6
"""Bytes a second that a disk is taken to write until it has been seen."""
SPARE_BYTES = 256_000_000
"""Room that keeping leaves on the disk for the output and for others."""
_RESULTS, _STATE, _RECORD = "results.safetensors", "state.safetensors", "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """What came of one layer: tensors, by names that are free, and rows of a report (JSON)."""

    tensors: Mapping[str, Tensor]
    rows: list[dict[str, Any]] = field(default_factory=list)


class State(Protocol):
    """What is carried from a layer to the next, as named tensors."""

    def state(self) -> Mapping[str, Tensor]:
        """The tensors as they are between two layers."""

    def restore(self, read: Callable[[str], Tensor]) -> None:
        """Take the tensors that `state` had given, by their names."""


class Resume:
    """The layers of one run. With `folder` None nothing is kept and everything is computed."""

    def __init__(self, folder: Path | None, *, count: int, state: State | None = None) -> None:
        self._folder = folder
        self._count = count
        self._state = state
        self._pending: dict[int, list[dict[str, Any]]] = {}  # the rows of layers whose results are not kept for sure
        self._pending_bytes = 0
        self._kept = 0.0
        self._rate = EXPECTED_RATE

    def results(self, compute: Callable[[int], LayerResult]) -> Iterator[tuple[int, LayerResult]]:
        """(number, result) of every layer in order: those that were kept, then `compute(number)` of the others."""
        kept = [] if self._folder is None else self._found(self._folder)
        for record in kept:
            for number, rows in record["rows"].items():
                yield int(number), self._read(int(number), rows)
        first = kept[-1]["last"] + 1 if kept else 0
        if kept:
            print(f"resume: {first} of {self._count} layers were done before; going on from there", file=sys.stderr)
            if self._state is not None:
                with safe_open(self._path(first - 1, _STATE), framework="pt") as opened:
                    self._state.restore(opened.get_tensor)
        self._kept = time.monotonic()
        for number in range(first, self._count):
            result = compute(number)
            if number + 1 < self._count:  # what is left to do after the last is less than keeping it
                self._keep(number, result)
            yield number, result

    def _keep(self, number: int, result: LayerResult) -> None:
        if self._folder is None:
            return
        try:
            size = _size(result.tensors)
            state = {} if self._state is None else self._state.state()
            if shutil.disk_usage(self._folder).free < size + _size(state) + SPARE_BYTES:
                raise OSError(f"{self._folder} has no room for {size + _size(state)} bytes more")
            # Results are written at once, which needs no memory; that they are on the disk is made sure with the state.
            _write(self._path(number, _RESULTS), result.tensors)
            self._pending[number] = result.rows
            self._pending_bytes += size
            begun, cost = time.monotonic(), (self._pending_bytes + _size(state)) / self._rate
            if begun - self._kept < cost / SHARE:
                return
            self._commit(self._folder, number, state)
            self._kept = time.monotonic()
            self._rate = max(self._pending_bytes + _size(state), 1) / (self._kept - begun)
            self._pending, self._pending_bytes = {}, 0
        except OSError as error:
            # Only the way back is lost; the work goes on, and says so itself if it cannot.
            print(f"resume: nothing is kept any more: {error}", file=sys.stderr)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _commit(self, folder: Path, number: int, state: Mapping[str, Tensor]) -> None:
        files = [self._path(layer, _RESULTS) for layer in self._pending]
        if state:
            files.append(self._path(number, _STATE))
            _write(files[-1], state)
        for path in files:
            _flush(path)
        digests = {path.name: sha256_file(path) for path in files}
        rows = {str(layer): rows for layer, rows in self._pending.items()}
        temporary = self._path(number, "tmp")
        content = {"last": number, "rows": rows, "sha256": digests}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        _flush(temporary)
        temporary.replace(self._path(number, _RECORD))
        _flush(folder)
        for path in folder.glob(f"*.{_STATE}"):
            if path.name not in digests:
                path.unlink()

    def _found(self, folder: Path) -> list[dict[str, Any]]:
        """The records of what was kept, in order. What is damaged or speaks for nothing is removed; damage is said."""
        records: list[dict[str, Any]] = []
        try:
            for path in sorted(folder.glob(f"*.{_RECORD}")):
                record = json.loads(path.read_text(encoding="utf-8"))
                layers = list(range(len(records) and records[-1]["last"] + 1, record["last"] + 1))
                if [str(layer) for layer in layers] != list(record["rows"]) or record["last"] >= self._count:
                    raise ValueError(f"{path.name} does not follow what is before it")
                records.append(record)
            whole = {self._path(record["last"], _RECORD).name for record in records}
            for record in records:
                # Of the states the last one alone is there and needed.
                names = [name for name in record["sha256"] if record is records[-1] or not name.endswith(_STATE)]
                if changed := [name for name in names if sha256_file(folder / name) != record["sha256"][name]]:
                    raise ValueError(f"{changed[0]} is damaged")
                whole |= set(names)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"resume: what was kept is not whole ({error}): everything is computed again", file=sys.stderr)
            records, whole = [], set()
        for path in folder.glob("*.*"):
            if path.name not in whole:
                path.unlink()
        return records

    def _read(self, number: int, rows: list[dict[str, Any]]) -> LayerResult:
        with safe_open(self._path(number, _RESULTS), framework="pt") as opened:
            return LayerResult(tensors={name: opened.get_tensor(name) for name in sorted(opened.keys())}, rows=rows)

    def _path(self, number: int, kind: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:05d}.{kind}"


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with TensorFile(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor.cpu())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
