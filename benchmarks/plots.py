"""Plots of rows: one function a benchmark, drawn from what its CSV file says and nothing else.

`ingot bench plot of=memory [rows=FILE] out=FILE.svg`. Needs matplotlib, the extra `bench`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import rows as results
from benchmarks.options import option, read_options

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, str]
FORMATS = (".svg", ".png", ".pdf")
ABOUT = """
Draws the rows of a benchmark into a file. Rows of different devices, commits or models are different lines; select=
keeps only rows whose columns have a value, such as select=recipe:fp16,batch:64.
"""


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench plot", about=ABOUT)
    check_plot(options.out)
    path = options.rows or results.RESULTS / f"{options.of}.csv"
    if not path.is_file():
        raise ValueError(f"{path} is not there: run `ingot bench {options.of}` first, or name a file with rows=FILE.")
    chosen = select(results.read(path), options.select)
    if not chosen:
        raise ValueError(f"{path} has no rows with {', '.join(options.select)}: nothing to draw.")
    draw(options.of, chosen, options.out)
    print(f"{len(chosen)} rows -> {options.out}")
    return 0


def check_plot(path: Path) -> None:
    """ValueError where a plot could not be written to `path`, before anything is measured."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} is no plot: its name must end in {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib, which is not installed: make setup, or pip install matplotlib.")


def select(rows: Iterable[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows that have all the values of `column:value` texts; ValueError for another form."""
    pairs = []
    for text in wanted:
        column, colon, value = text.partition(":")
        if not colon:
            raise ValueError(f"select={text} is not understood: write column:value, such as batch:64.")
        pairs.append((column, value))
    return [row for row in rows if all(row.get(column, "") == value for column, value in pairs)]


def draw(of: str, rows: Sequence[Row], path: Path) -> None:
    """Write the plot of a benchmark; the file is whole or not there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text, and two runs over equal rows write equal files.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ingot"})
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    try:
        PLOTS[of](axes, rows)
        axes.grid(alpha=0.3)
        axes.set_title(title(rows), fontsize="small")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(
            temporary, format=path.suffix[1:], dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None
        )
        temporary.replace(path)
    finally:
        pyplot.close(figure)


def title(rows: Sequence[Row]) -> str:
    """What all rows have in common of model, device and commit."""
    parts = []
    for column in ("model", "device", "commit"):
        values = {row.get(column, "") for row in rows}
        if len(values) == 1 and values != {""}:
            parts.append(values.pop())
    return ", ".join(parts)


def memory(axes: Axes, rows: Sequence[Row]) -> None:
    """GB against sequences, a line a recipe; dashed where the figures are computed."""
    fitting = [row for row in rows if row.get("total_mb")]
    for name, line in lines(fitting, ("recipe", "source"), "batch"):
        style = "--" if line[0]["source"] == "computed" else "-"
        axes.plot(numbers(line, "batch"), [mb / 1e3 for mb in numbers(line, "total_mb")], style, marker="o", label=name)
    axes.set(xlabel=f"sequences of {common(rows, 'context')} tokens", ylabel="memory, GB", ylim=(0, None))
    axes.legend(fontsize="small")


def generation(axes: Axes, rows: Sequence[Row]) -> None:
    """Tokens a second against batch size, a line an engine and recipe, with the floor of each dotted."""
    for name, line in lines(rows, ("engine", "recipe", "input", "output"), "batch"):
        [drawn] = axes.plot(numbers(line, "batch"), numbers(line, "tokens_per_second"), marker="o", label=name)
        with_floor = [row for row in line if row.get("floor_tokens_per_second")]
        floor = numbers(with_floor, "floor_tokens_per_second")
        axes.plot(numbers(with_floor, "batch"), floor, ":", color=drawn.get_color())
    axes.set(xlabel="batch size", ylabel="tokens / s (dotted: floor)", xscale="log", yscale="log")
    axes.legend(fontsize="small")


def serving(axes: Axes, rows: Sequence[Row]) -> None:
    """The median and the 99th percentile of the time to the first text against the rate, a line a recipe."""
    at_rates = [row for row in rows if row.get("case") == "rate" and row["rate"] != "all at once"]
    for name, line in lines(at_rates, ("engine", "recipe"), "rate"):
        [drawn] = axes.plot(numbers(line, "rate"), numbers(line, "first_p50_ms"), marker="o", label=f"{name}, median")
        late = numbers(line, "first_p99_ms")
        axes.plot(numbers(line, "rate"), late, "--", marker=".", color=drawn.get_color(), label=f"{name}, 99th")
    axes.set(xlabel="requests / s sent", ylabel="time to the first text, ms", yscale="log")
    axes.legend(fontsize="small")


def throughput(axes: Axes, rows: Sequence[Row]) -> None:
    """Requests a second, a bar an engine and recipe, the latest row of each."""
    bars = {name: line[-1] for name, line in lines(rows, ("engine", "recipe", "data"), "time")}
    axes.barh(list(bars), [float(row["requests_per_second"]) for row in bars.values()])
    axes.set(xlabel="requests / s")


def kernels(axes: Axes, rows: Sequence[Row]) -> None:
    """Share of the ceiling, a bar a kernel, size and implementation, the latest row of each."""
    bars = {name: line[-1] for name, line in lines(rows, ("kernel", "size", "implementation"), "time")}
    axes.figure.set_size_inches(7, max(2.0, 0.22 * len(bars)))  # type: ignore[union-attr]
    axes.barh(list(bars), [float(row["share"]) for row in bars.values()])
    axes.tick_params(axis="y", labelsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="share of the device's ceiling")


def lines(rows: Sequence[Row], columns: Sequence[str], along: str) -> list[tuple[str, list[Row]]]:
    """The rows by the values of `columns` (those of device, model and commit too, where they differ), in the order of
    `along`; of rows that are alike the last counts. A line's name says what sets it apart."""
    told = [*columns, *(name for name in ("model", "device", "commit") if len({row.get(name) for row in rows}) > 1)]
    told = [name for name in told if len({row.get(name) for row in rows}) > 1] or list(columns[:1])
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(", ".join(row.get(name, "") for name in told), {})[row[along]] = row
    return [(name, sorted(line.values(), key=lambda row: _order(row[along]))) for name, line in found.items()]


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def common(rows: Sequence[Row], column: str) -> str:
    return " or ".join(sorted({row[column] for row in rows}, key=_order))


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return 0.0, text


PLOTS: dict[str, Callable[[Axes, Sequence[Row]], None]] = {
    "generation": generation,
    "kernels": kernels,
    "memory": memory,
    "serving": serving,
    "throughput": throughput,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    of: str = option("memory", "the benchmark whose rows are drawn", choices=tuple(PLOTS))
    rows: Path | None = option(None, "a file of rows (the benchmark's own under benchmarks/results/)")
    select: tuple[str, ...] = option((), "keep rows with these values only: column:value,column:value")
    out: Path = option(Path("plot.svg"), "the file that is written: .svg, .png or .pdf")
