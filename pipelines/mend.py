"""What a killed dvc leaves half-written, and would then refuse to start on, is put away.

dvc (3.67) writes `.dvc/tmp/rwlock` and `dvc.lock` in place. Killed while it does, the next `dvc repro` says that the
file is corrupted. Without them nothing is lost: what was built comes from the run cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

QUIET_SECONDS = 2.0
"""A file that was written to more recently than this may still be being written."""


def mend(root: Path) -> list[str]:
    """Remove the files that are half-written, and say which, one sentence each."""
    said = []
    for name, is_whole in ((".dvc/tmp/rwlock", _is_whole_rwlock), ("dvc.lock", _is_whole_lock)):
        path = root / name
        if _is_broken(path, is_whole):
            path.unlink(missing_ok=True)
            said.append(f"{name} was left half-written by a dvc that was killed, and was removed.")
    return said


def _is_broken(path: Path, is_whole: Callable[[bytes], bool]) -> bool:
    while True:
        try:
            if is_whole(path.read_bytes()):
                return False
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        if age >= QUIET_SECONDS:
            return True
        time.sleep(0.2)


def _is_whole_rwlock(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def _is_whole_lock(content: bytes) -> bool:
    try:
        lock = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return all(_is_whole_stage(stage) for stage in lock["stages"].values())
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False


def _is_whole_stage(stage: dict[str, Any]) -> bool:
    entries = [*stage.get("deps", []), *stage.get("outs", [])]
    return isinstance(stage["cmd"], str) and all(entry["path"] and entry.get("md5") for entry in entries)
