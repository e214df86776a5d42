"""Rows of measurements in CSV files: where they were made, how they are appended, and how they are shown."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
NOWHERE = Path("none")


def provenance(device: str = "cpu") -> dict[str, object]:
    """What begins every row: time, commit, versions of the libraries, and the device: a GPU's name, else the class of
    the processor and how many there are."""
    found: dict[str, object] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit()}
    found |= {name: version for name, version in toolchain().items() if version}
    if device.startswith("cuda"):
        import torch

        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["processors"] = os.cpu_count()
    return found


def commit() -> str:
    """The commit that is measured, marked where the tree differs from it in more than results. Without git,
    INGOT_COMMIT, else `none`."""
    try:
        described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, cwd=ROOT)
        apart = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(apart, stderr=subprocess.DEVNULL, cwd=ROOT).returncode == 1
    except OSError:
        return os.environ.get("INGOT_COMMIT") or "none"
    answer = described.stdout.strip()
    return answer + "-dirty" * changed if answer else os.environ.get("INGOT_COMMIT") or "none"


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a results file. A column that is new to it is empty in the rows before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Mapping[str, object]] = list(read(path)) if path.exists() else []
    columns = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])
    temporary.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; FileNotFoundError without it."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_out(path: Path) -> None:
    """ValueError where rows could not be added to `path`, before anything is measured."""
    if path == NOWHERE:
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"out={path} cannot be written: name a CSV file, or `none` to keep no rows.")


def record(path: Path, row: Mapping[str, object], shown: Sequence[str]) -> None:
    """Append a row (nowhere, where `path` is `none`) and print the columns `shown` of it on one line."""
    if path != NOWHERE:
        append(path, row)
    print("  ".join(f"{name}={row[name]}" for name in shown if row.get(name, "") != ""), flush=True)


def say(text: str) -> None:
    """What runs now, on a terminal alone: a row may take many minutes."""
    if sys.stderr.isatty():
        print(f"{text} ...", file=sys.stderr, flush=True)
