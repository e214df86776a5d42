"""Two tiers: a plain run takes every property at a small count; `--soak` runs the long counts alone and keeps a row."""

import csv
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Without a GPU, kernels run under Triton's interpreter; it is asked for before Triton is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROWS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "soak.csv"
COLUMNS = ["time", "commit", "test", "count", "failures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the tests marked soak, at the counts that they name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    # By marker: among an item's keywords is also the name of the checkout's folder.
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def commit() -> str:
    """The commit that is tested, marked where the tree differs in more than results. Without git, INGOT_COMMIT."""
    root = ROWS.parents[2]
    answer = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, cwd=root)
    apart = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(apart, cwd=root).returncode == 1
    return (answer.stdout.strip() or os.environ.get("INGOT_COMMIT") or "none") + "-dirty" * changed


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
