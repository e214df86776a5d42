"""Two tiers: a plain run takes every property at a small count; `--soak` runs the long counts alone and keeps a row."""

import csv
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROWS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "soak.csv"
COLUMNS = ["time", "commit", "test", "count", "failures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the tests marked soak, at the counts that they name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    chosen = [item for item in items if "soak" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "soak" in item.keywords])
    items[:] = chosen


def commit() -> str:
    """The commit that is tested, with a mark when the tree differs from it; `none` without git."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROWS.parent)
    return answer.stdout.strip() or "none"


@pytest.fixture
def soak_row(request: pytest.FixtureRequest) -> Iterator[dict[str, int]]:
    """A dict whose `count` and `failures` become one row of benchmarks/results/soak.csv when the test ends."""
    row = {"count": 0, "failures": 0}
    yield row
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    fresh = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        writer.writerow([when, commit(), request.node.nodeid, row["count"], row["failures"]])
