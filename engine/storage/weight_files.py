"""Files of tensors: safetensors, and PyTorch's pickled ones, which are read by torch's weights-only reader alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.storage.json_file import parse_object
from engine.wording import cut, shown

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (type as safetensors calls it, shape)."""

KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
PICKLED = (".bin", ".pth")
LONGEST_NAME = 256


class WeightFile(Protocol):
    """Tensors on disk. `tensors` has been checked against the file's size; `read` maps, it does not load."""

    @property
    def path(self) -> Path: ...
    @property
    def paths(self) -> list[Path]: ...
    @property
    def tensors(self) -> Shapes: ...
    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class SafetensorsFile:
    def __init__(self, path: Path) -> None:
        """ValueError naming the first tensor that is cut off."""
        self.path = path
        self.paths = [path]
        self.tensors: Shapes = _read_header(path)
        try:
            with safe_open(path, framework="pt"):
                pass  # the library's own check of types, shapes and overlaps
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({cut(str(error))}): fetch it again") from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as stored. Nothing is kept here: the mapping of the file goes with them."""
        with safe_open(self.path, framework="pt") as opened:
            return {name: _tensor(opened, name) for name in names}


class PickledFile:
    def __init__(self, path: Path) -> None:
        """ValueError for a file that is damaged, or that holds anything but tensors by name."""
        self.path = path
        self.paths = [path]
        self.tensors: Shapes = {
            name: (KINDS.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in self._load().items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as stored. Nothing is kept here: the mapping of the file goes with them."""
        loaded = self._load()
        return {name: loaded[name] for name in names}

    def _load(self) -> dict[str, Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        # What torch raises for a damaged or hostile file depends on where in the file it stumbles.
        except Exception as error:
            reason = cut(str(error).strip().partition("\n")[0]) or type(error).__name__
            raise ValueError(
                f"{self.path} cannot be read as weights alone ({reason}): it is damaged, older than PyTorch 1.6, or "
                "holds more than tensors. Fetch it again, or convert the checkpoint to safetensors where it is trusted"
            ) from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{self.path} holds a {type(loaded).__name__}, not tensors by name")
        for name, tensor in loaded.items():
            if not isinstance(name, str) or type(tensor) is not Tensor or tensor.layout is not torch.strided:
                raise ValueError(
                    f"{self.path} holds {shown(name)}, which is not a plain tensor: a {type(tensor).__name__}"
                )
            if tensor.nbytes > tensor.untyped_storage().nbytes():
                raise ValueError(f"{self.path} holds {shown(name)}, which repeats values up to {tensor.nbytes} bytes")
        check_names(loaded, self.path)
        return loaded


def open_weights(path: Path, *, allow_bin: bool) -> WeightFile:
    """The file, by its ending. ValueError for a pickled one that is not allowed, naming the option that allows it."""
    if path.suffix not in PICKLED:
        return SafetensorsFile(path)
    if not allow_bin:
        raise ValueError(
            f"{path} holds pickled weights, which are read only when the model's configuration allows it: set "
            "model.allow_bin=true (torch then reads them as weights alone, without running code), or convert the "
            "checkpoint to safetensors"
        )
    return PickledFile(path)


def check_names(tensors: Iterable[str], path: Path) -> None:
    """ValueError for the name of a tensor that is no name: longer than any, or with characters that do not print."""
    for name in tensors:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ValueError(f"{path} has a tensor of the name {shown(name)}, which is none: fetch it again")


def _tensor(opened: Any, stored: str) -> Tensor:
    loaded: Tensor = opened.get_tensor(stored)
    return loaded


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of a safetensors file; ValueError naming the first tensor that is cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header_end = 8 + length
        if size < 8 or header_end > size:
            raise ValueError(f"{path} is cut off or not a safetensors file: its header does not fit in {size} bytes")
        try:
            entries = parse_object(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: its header {error}") from error
    entries.pop("__metadata__", None)
    check_names(entries, path)
    try:
        header = {
            name: (str(entry["dtype"]), tuple(map(int, entry["shape"])), int(entry["data_offsets"][1]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header has an entry without type, shape or place, or "
            f"with others ({cut(repr(error))})"
        ) from error
    for name, (_, _, end) in sorted(header.items(), key=lambda item: item[1][2]):
        if header_end + end > size:
            raise ValueError(
                f"{path} is cut off: {name} ends at byte {shown(header_end + end)} of {size}; fetch that file again"
            )
    return {name: (kind, shape) for name, (kind, shape, _) in header.items()}
