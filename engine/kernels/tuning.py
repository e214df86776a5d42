"""Which configuration of a kernel runs a product: read from a table of this device, never searched for while serving.

A table is tuned/<device>.json: rows of an operation, N, K, a bucket of M and the configuration that was fastest there.
A shape that a table lacks takes the row of the nearest one; a device without a table takes each operation's defaults.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tuned"
# A product of M rows is run as the smallest bucket that holds M; above the last, as the last.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# A row of a table stands for shapes up to this ratio of N, and of K.
NEAR = 2.0
# What follows the name of an operation in rows for contexts of unequal lengths.
UNEVEN = "_uneven"

Config = Mapping[str, Any]


def bucket(m: int) -> int:
    return next((size for size in BUCKETS if m <= size), BUCKETS[-1])


@functools.cache
def table(device: str) -> dict[tuple[str, int], list[tuple[int, int, Config]]]:
    """(operation, bucket) -> its rows (n, k, configuration); empty for an unknown device."""
    path = TABLES / f"{device}.json"
    rows: dict[tuple[str, int], list[tuple[int, int, Config]]] = {}
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            rows.setdefault((row["op"], row["m"]), []).append((row["n"], row["k"], row["config"]))
    return rows


@functools.lru_cache(maxsize=4096)
def lookup(op: str, device: str, n: int, k: int, m: int, *, uneven: bool = False) -> Config | None:
    """The configuration of the nearest shape of M's bucket, or None where none is near; with `uneven` that shape's row
    for unequal contexts, where it has one."""

    def distance(row: tuple[int, int, Config]) -> float:
        return max(abs(math.log2(row[0] / n)), abs(math.log2(row[1] / k)))

    nearest = min(table(device).get((op, bucket(m)), ()), key=distance, default=None)
    if nearest is None or distance(nearest) > math.log2(NEAR):
        return None
    others = table(device).get((op + UNEVEN, bucket(m)), ()) if uneven else ()
    return next((row[2] for row in others if row[:2] == nearest[:2]), nearest[2])


def write(device: str, rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str], folder: Path = TABLES) -> Path:
    """Writes rows {op, n, k, m, config} as the table of a device, one row a line, and returns its path.

    Rows of the same operation, n, k and m that an older table in `folder` holds are replaced, and with them those for
    unequal contexts; its other rows stay.
    """
    path = folder / f"{device}.json"
    merged = {}
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            merged[row["op"], row["n"], row["k"], row["m"]] = row
    for row in rows:
        merged.pop((row["op"] + UNEVEN, row["n"], row["k"], row["m"]), None)
    for row in rows:
        merged[row["op"], row["n"], row["k"], row["m"]] = dict(row)
    head = json.dumps({"device": device, **versions})[:-1]
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "rows": [\n{lines}\n]}}\n')
    table.cache_clear()
    lookup.cache_clear()
    return path
