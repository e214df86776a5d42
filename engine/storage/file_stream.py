"""Files on their way to a device: read ahead by threads, and hashed from the same bytes."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

# Bytes that are read, hashed and sent at once; a thread has two such pieces of pinned memory.
PIECE = 4 << 20
# Bytes of files that may lie on the device before they are asked for.
AHEAD = 1 << 30
MOST_THREADS = 16


class FileStream:
    """The files of a folder as tensors of bytes on a device.

    `order` says in which order they will be asked for: those next in it are read while the last ones are worked on. One
    that is asked for out of order is read then.
    """

    def __init__(self, folder: Path, order: Iterable[tuple[str, int]], device: torch.device, *, ahead: int = AHEAD):
        """`order` has names and sizes."""
        self._digests: dict[str, str] = {}
        self._folder, self._device, self._ahead = folder, device, ahead
        self._next = deque(order)
        self._read: dict[str, tuple[int, Future[tuple[Tensor, str]]]] = {}
        self._bytes = 0
        self._threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="file-stream")
        self._own = threading.local()
        self._read_on()

    def take(self, name: str, dtype: torch.dtype) -> Tensor:
        """The whole file [n] on the device. OSError, or ValueError for one that has not whole numbers of this type."""
        size, job = self._read.pop(name, (0, None))
        self._bytes -= size
        self._read_on()
        raw, digest = self._bytes_of(name) if job is None else job.result()
        self._digests[name] = digest
        if len(raw) % dtype.itemsize:
            raise ValueError(f"{self._folder / name} has {len(raw)} bytes, no whole number of {dtype}")
        return raw.view(dtype)

    def close(self) -> dict[str, str]:
        """The SHA-256 of every file that was read, taken from the bytes that went to the device. Nothing more is asked
        for."""
        self._next.clear()
        self._threads.shutdown(cancel_futures=True)
        for name, (_, job) in self._read.items():
            if not job.cancelled() and job.exception() is None:
                self._digests[name] = job.result()[1]
        self._read.clear()
        return self._digests

    def _read_on(self) -> None:
        while self._next and (not self._read or self._bytes + self._next[0][1] <= self._ahead):
            name, size = self._next.popleft()
            if name not in self._digests:
                self._read[name] = size, self._threads.submit(self._bytes_of, name)
                self._bytes += size

    def _bytes_of(self, name: str) -> tuple[Tensor, str]:
        digest = hashlib.sha256()
        with os.fdopen(os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
            raw = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8, device=self._device)
            pieces = self._pieces()
            pieces.begin()
            place = 0
            while place < len(raw):
                piece = pieces.next()
                count = file.readinto(memoryview(piece.numpy())[: len(raw) - place])  # type: ignore[arg-type]
                if not count:
                    raise OSError(f"{self._folder / name} became shorter while it was read")
                digest.update(piece.numpy()[:count])  # type: ignore[arg-type]
                pieces.send(raw[place : place + count], piece[:count])
                place += count
            pieces.end()
        return raw, digest.hexdigest()

    def _pieces(self) -> _Pieces:
        if not hasattr(self._own, "pieces"):
            self._own.pieces = _Pieces(self._device)
        pieces: _Pieces = self._own.pieces
        return pieces


class _Pieces:
    """Two pieces of memory in turn: one is filled while the other is on its way. Of one thread."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._memory = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        self._turn = 0
        if self._on_gpu:
            self._device = device
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        if self._on_gpu:  # what the new tensor's memory held before may still be read
            self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def next(self) -> Tensor:
        self._turn = 1 - self._turn
        if self._on_gpu:
            self._sent[self._turn].synchronize()
        return self._memory[self._turn]

    def send(self, to: Tensor, piece: Tensor) -> None:
        if not self._on_gpu:
            to.copy_(piece)
            return
        with torch.cuda.stream(self._stream):
            to.copy_(piece, non_blocking=True)
            self._sent[self._turn].record(self._stream)

    def end(self) -> None:
        if self._on_gpu:
            self._stream.synchronize()
