"""Files written block by block: while the next block is made, threads hash the last ones and bring them to disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from engine.storage.artifacts import FileEntry

BLOCK_BYTES = 4 << 20
"""What a block should have: few enough for a processor's cache, many enough for a disk."""
WAITING_BLOCKS = 4
FLUSHED_BYTES = 32 << 20
WAITING_FLUSHES = 2


@dataclass(slots=True, kw_only=True)
class _Begun:
    file: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0


class FileWriter:
    """Writes files whose sizes are known, each from its first block to its last, several of them side by side.

        with FileWriter(folder, sizes) as writer:
            writer.append("a", block)
        writer.entries

    Once the block is left, `entries` has name, size and SHA-256 of each file, of the very bytes that were written.
    They are flushed on the way, so that the disk does not idle until the end; the last FLUSHED_BYTES are left to
    whoever makes the folder a lasting one. `progress` is told the bytes as they are written.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int], *, progress: Callable[[int], object] | None = None
    ) -> None:
        self.entries: list[FileEntry] = []
        self._folder, self._sizes, self._progress = folder, sizes, progress
        self._begun: dict[str, _Begun] = {}
        self._unflushed: dict[str, _Begun] = {}
        self._unflushed_bytes = 0
        self._blocks: deque[tuple[int, tuple[Future[Any], ...]]] = deque()
        self._flushes: deque[Future[None]] = deque()
        # A thread for each job keeps the blocks of a file in order.
        self._hash, self._write, self._flush = (ThreadPoolExecutor(1) for _ in range(3))

    def append(self, name: str, block: memoryview) -> None:
        """The next bytes of a file, which must not change any more. ValueError for more than the file may have."""
        if name not in self._begun:
            self._begun[name] = _Begun(file=(self._folder / name).open("wb"))
        begun = self._unflushed[name] = self._begun[name]
        begun.size += block.nbytes
        self._unflushed_bytes += block.nbytes
        if begun.size > self._sizes[name]:
            raise ValueError(f"{self._folder / name} would have {begun.size} bytes instead of {self._sizes[name]}")
        jobs = (self._hash.submit(begun.digest.update, block), self._write.submit(begun.file.write, block))
        self._blocks.append((block.nbytes, jobs))
        if self._unflushed_bytes >= FLUSHED_BYTES:
            self._flushes.append(self._flush.submit(self._to_disk, *self._closed()))
        self._wait(WAITING_BLOCKS, WAITING_FLUSHES)

    def settle(self) -> None:
        """Return when all blocks have been written and hashed, so that nothing holds any more what they lie in, and the
        system has back what they took: blocks that threads let go of in another order leave holes between them."""
        self._wait(0, WAITING_FLUSHES)
        for threads in (self._hash, self._write):
            threads.submit(int).result()  # a thread lets go of its last job when it takes up another
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._closed()[0].result()
                self._wait(0, 0)
        finally:
            for threads in (self._hash, self._write, self._flush):
                threads.shutdown(cancel_futures=True)
            for begun in self._begun.values():
                begun.file.close()
        if error is not None:
            return
        for name, size in self._sizes.items():
            if name not in self._begun or self._begun[name].size != size:
                found = self._begun[name].size if name in self._begun else 0
                raise ValueError(f"{self._folder / name} has {found} bytes instead of {size}")
            self.entries.append(FileEntry(path=name, size=size, sha256=self._begun[name].digest.hexdigest()))

    def _closed(self) -> tuple[Future[None], list[Path]]:
        """When what was appended so far has been written, with whole files closed; and the files that had some."""
        waiting = [(name, begun, begun.size == self._sizes[name]) for name, begun in self._unflushed.items()]
        self._unflushed, self._unflushed_bytes = {}, 0

        def close() -> None:
            for _, begun, whole in waiting:
                begun.file.close() if whole else begun.file.flush()

        return self._write.submit(close), [self._folder / name for name, _, _ in waiting]

    def _to_disk(self, written: Future[None], paths: list[Path]) -> None:
        written.result()
        for path in paths:
            flush(path)

    def _wait(self, blocks: int, flushes: int) -> None:
        """Until no more blocks and flushes than these are unfinished; an error of theirs is raised here."""
        while len(self._blocks) > blocks:
            size, jobs = self._blocks.popleft()
            for job in jobs:
                job.result()
            if self._progress is not None:
                self._progress(size)
        while len(self._flushes) > flushes:
            self._flushes.popleft().result()


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
