"""Every object that dvc.lock names is whole in the cache. `dvc repro` exits 0 when the disk was full and they are not.

What a killed dvc left half-written is put away first, so that `dvc repro` starts again.

ingot verify      or      python -m pipelines.verify
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from pipelines.mend import mend
from pipelines.worktree import cache_folder, project_root

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cached object: its MD5 (with `.dir` for a listing), and what it is in the project."""

    md5: str
    name: str


def locked(root: Path) -> list[Entry]:
    """The outputs in dvc.lock of the stage instances that are selected now; of older ones nothing is promised."""
    lock = root / "dvc.lock"
    if not lock.is_file():
        raise FileNotFoundError(f"{lock} does not exist: nothing has been built yet. `dvc repro` builds.")
    stages = yaml.load(lock.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
    declared = yaml.safe_load((root / "dvc.yaml").read_bytes())["stages"]
    uncached = {name for name, stage in declared.items() if any(isinstance(out, dict) for out in stage["outs"])}
    slices = root / "build/slices"
    selected = {f"{path.parent.name}@{path.stem}" for path in slices.glob("*/*.json")} | {"compose"}
    return [
        Entry(md5=out["md5"], name=out["path"])
        for name, stage in sorted(stages.items())
        if (name in selected or not slices.is_dir()) and name.partition("@")[0] not in uncached
        for out in stage.get("outs", [])
        if "md5" in out
    ]


def broken(cache: Path, entries: Sequence[Entry]) -> list[str]:
    """One line for every object that is absent from the cache, or whose bytes are not what its name says."""
    problems: list[str] = []
    files: dict[str, str] = {}
    for entry in entries:
        if not entry.md5.endswith(".dir"):
            files.setdefault(entry.md5, entry.name)
            continue
        problem = _problem(cache, entry.md5)
        if problem:
            problems.append(f"{entry.name}: {problem}")
            continue
        for child in json.loads(_object(cache, entry.md5).read_bytes()):
            files.setdefault(child["md5"], f"{entry.name}/{child['relpath']}")
    problems += [f"{files[md5]}: {problem}" for md5, problem in _checked(cache, sorted(files)) if problem]
    return sorted(problems)


def main(argv: Sequence[str] | None = None) -> int:
    """Check the project in the current folder; 1 and the broken objects by name if there are any."""
    parser = argparse.ArgumentParser(prog="ingot verify", description="Check that all that was built is whole.")
    parser.parse_args(argv)
    try:
        root = project_root()
        for said in mend(root):
            print(said, file=sys.stderr)
        entries = locked(root)
        problems = broken(cache_folder(root), entries)
    except (ValueError, OSError) as error:
        print(f"ingot verify: {error}", file=sys.stderr)
        return 1
    if problems:
        print(
            f"{len(problems)} objects that dvc.lock names are not whole in the cache (was the disk full?). Delete the"
            " damaged ones, then `dvc repro` makes them again:",
            *problems,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    print(f"{len(entries)} outputs are whole in the cache")
    return 0


def _checked(cache: Path, digests: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        problems = pool.map(lambda md5: _problem(cache, md5), digests)
        bar = tqdm(problems, total=len(digests), desc="verify", unit="file", file=sys.stderr, disable=None)
        yield from zip(digests, bar, strict=True)


def _object(cache: Path, md5: str) -> Path:
    return cache / "files/md5" / md5[:2] / md5[2:]


def _problem(cache: Path, md5: str) -> str | None:
    path = _object(cache, md5)
    if not path.is_file():
        return f"{path} is absent"
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    return None if found == md5.removesuffix(".dir") else f"{path} is damaged (its MD5 is {found})"


if __name__ == "__main__":
    raise SystemExit(main())
