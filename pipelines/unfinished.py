"""Where a stage keeps its work layer by layer until it is done, so that one that was killed can go on.

It lies beside what DVC caches (`<cache>/unfinished/<key>/`), which the project and the copies that `ingot build` makes
of it share; for a stage that runs on its own, beside its output (`.unfinished/<key>/`). The key is the SHA-256 of all
that decides about bits: the slice, the code, the inputs and the device. So what is found under a key is what would be
computed again. Torch-free.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.code import Code
from pipelines.slices import PATHS, Call
from pipelines.sources import sha256_file

LONGEST_DAYS = 14
MOST_ABANDONED = 4
"""Folders of runs that nobody continues: older ones go, and no more than these stay."""
_LOCK = "lock"


@contextlib.contextmanager
def unfinished_work(call: Call, stage: str, recipe: str | None = None) -> Iterator[Path | None]:
    """The folder of this run's unfinished work, its own while the block lasts; removed when the work is done.

    It stays when the process is killed or the machine fails it (OSError), and goes where the work itself is refused
    (ValueError): that would only be refused again. None where another process has it, or it cannot be written:
    then nothing is kept, and the work is done all the same.
    """
    parent = _parent(call)
    folder = parent / run_key(call, stage, recipe)
    lock = _lock(folder)
    if lock is None:
        yield None
        return
    try:
        _sweep(parent, folder.name)
        yield folder
    except ValueError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):
            parent.rmdir()  # where nothing else is unfinished


def run_key(call: Call, stage: str, recipe: str | None = None) -> str:
    """SHA-256 of the slice, the code that the stage can reach, the bytes of its inputs, and the device."""
    inputs = {
        f"{name}/{path.relative_to(folder).as_posix()}": sha256_file(path)
        for name, folder in call.inputs.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    code = Code(Path(__file__).resolve().parents[1]).digests(stage, recipe)
    content = {"stage": stage, "slice": call.slice, "code": code, "inputs": inputs, "device": _device(call.device)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parent(call: Call) -> Path:
    with contextlib.suppress(OSError, ValueError):
        if cache := json.loads(PATHS.read_text(encoding="utf-8")).get("cache"):
            return Path(cache) / "unfinished"
    return call.out.parent / ".unfinished"


def _device(name: str) -> str:
    """Bits differ between kinds of GPU; a CPU's class is in the slice."""
    if name == "cpu":
        return name
    import torch

    return f"{name} {torch.cuda.get_device_name(name)}"


def _lock(folder: Path) -> int | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / _LOCK).stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except OSError:
        pass  # another process has it, or had it until just now and removed it
    os.close(descriptor)
    return None


def _sweep(parent: Path, own: str) -> None:
    """Remove the oldest of what nobody works on or continues."""
    others = sorted((path for path in parent.iterdir() if path.name != own), key=_changed, reverse=True)
    for number, path in enumerate(others):
        if number < MOST_ABANDONED and time.time() - _changed(path) < LONGEST_DAYS * 86400:
            continue
        if (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
