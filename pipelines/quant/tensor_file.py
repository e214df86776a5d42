"""A safetensors file written tensor by tensor, so that no more than one has to be in memory, and read the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from torch import Tensor

KINDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class TensorFile:
    """A file whose tensors, types and shapes are known from the start; they are written in any order.

    Tensors lie sorted by name and there is no metadata: equal tensors give equal bytes. Leaving the block without
    having written every tensor is an error.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self._plan = plan
        header: dict[str, object] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for name in sorted(plan):
            dtype, shape = plan[name]
            start, end = end, end + dtype.itemsize * _count(shape)
            header[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._missing = set(plan)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._first + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; ValueError when it is not what was announced."""
        dtype, shape = self._plan[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; announced was {dtype} {tuple(shape)}")
        self._file.seek(self._first + self._starts[name])
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None and self._missing:
            raise ValueError(f"{self._file.name} lacks {', '.join(sorted(self._missing)[:3])}")


def tensors_over(path: Path, otherwise: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """A reader of tensors by name: of the file where it is there and has them, else what `otherwise` answers."""
    if not path.is_file():
        return otherwise
    with safe_open(path, framework="pt") as opened:
        held = frozenset(opened.keys())

    def read(name: str) -> Tensor:
        if name not in held:
            return otherwise(name)
        with safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return read


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
