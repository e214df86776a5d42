"""What a build came to: the statements and ids of its artifacts, read from build/, and shown as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHORT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One published artifact. `gates` and `metrics` are the statement's own."""

    key: str
    id: str
    verdict: str
    sizes: dict[str, int]
    metrics: dict[str, Any]
    gates: list[dict[str, Any]]

    def metric(self, name: str) -> float:
        """The measured value, NaN where the evaluation set does not measure it or where it is not finite."""
        value = self.metrics.get(name, {}).get("value")
        return math.nan if value is None else float(value)

    @property
    def misses(self) -> list[dict[str, Any]]:
        """The gates that were not passed."""
        return [gate for gate in self.gates if gate["verdict"] != "pass"]


def selected_keys(root: Path) -> list[str]:
    """The keys of all artifacts that are selected now. FileNotFoundError before compose has run."""
    keys = sorted(path.stem for path in (root / "build/slices/publish").glob("*.json"))
    if not keys:
        raise FileNotFoundError(f"{root / 'build/slices'} is empty: nothing has been built yet. `dvc repro` builds.")
    return keys


def read_outcome(root: Path, key: str) -> Outcome:
    """What became of one artifact. FileNotFoundError when its build has not come to the end."""
    published, statement = root / f"build/publish/{key}.json", root / f"build/evaluate/{key}/statement.json"
    if not published.is_file() or not statement.is_file():
        raise FileNotFoundError(f"{key} is not built to the end. Run `dvc repro publish@{key}`.")
    about = json.loads(published.read_text(encoding="utf-8"))
    predicate = json.loads(statement.read_text(encoding="utf-8"))["predicate"]
    return Outcome(
        key=key,
        id=about["id"],
        verdict=predicate["verdict"],
        sizes=predicate["sizes"],
        metrics=predicate["metrics"],
        gates=predicate["gates"],
    )


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show rows in at most 120 columns; the first column of a row and numbers are never cut, words are wrapped."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        wrapped = index == len(columns) - 1
        table.add_column(name, no_wrap=not wrapped, overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table, highlight=False, markup=False)


def number(value: float | None) -> str:
    """A figure for a table, `-` where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
