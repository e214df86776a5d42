"""Small figures as SVG text: lines over layers, and a map of layers by linears. They take their colours from the page.

Classes of the page's style sheet: `axis`, `grid`, `text`, `line-0` to `line-3`, `dot-0` to `dot-3`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30
CELL, LABELS = 20, 86


def lines(series: Mapping[str, Sequence[float]], *, log: bool, what: str) -> str:
    """One line a series over the numbers of layers; values that are not finite (with `log`, above 0) are gaps."""
    shown = [v for values in series.values() for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not shown:
        return '<p class="none">no values</p>'
    count = max(len(values) for values in series.values())
    ticks = _log_ticks(min(shown), max(shown)) if log else _ticks(min(*shown, 0.0), max(shown))
    low, high = ticks[0], ticks[-1]

    def x(layer: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (layer / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - part)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(what)}">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="text" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for layer in _some(count):
        parts.append(f'<text class="text" x="{x(layer):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{layer}</text>')
    parts.append(f'<text class="text" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 1}" text-anchor="middle">layer</text>')
    for number, (name, values) in enumerate(series.items()):
        points = [(x(i), y(v)) if math.isfinite(v) and (v > 0 or not log) else None for i, v in enumerate(values)]
        parts += [f'<polyline class="line-{number % 4}" points="{run}"/>' for run in _runs(points)]
        for layer, point in enumerate(points):
            if point:
                title = f"<title>{escape(name)}, layer {layer}: {values[layer]:.4g}</title>"
                parts.append(
                    f'<circle class="dot-{number % 4}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="2.6">{title}</circle>'
                )
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """What the lines are, in the order in which they were given."""
    items = (f'<span><i class="key-{number % 4}"></i>{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{"".join(items)}</p>'


def heat(rows: Mapping[str, Sequence[float]], *, what: str) -> str:
    """A cell a row and layer, from light for the least value to dark for the most; its number on hovering."""
    count = max((len(values) for values in rows.values()), default=0)
    known_values = [v for values in rows.values() for v in values if math.isfinite(v)]
    least = min(known_values, default=0.0)
    span = (max(known_values, default=0.0) - least) or 1.0
    width, height = LABELS + count * CELL + RIGHT, len(rows) * CELL + BOTTOM
    parts = [
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.2:.0f}px" role="img"'
        f' aria-label="{escape(what)}">'
    ]
    for index, (name, values) in enumerate(rows.items()):
        top = index * CELL
        parts.append(f'<text class="text" x="{LABELS - 6}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        for layer, value in enumerate(values):
            known = math.isfinite(value)
            shade = f'fill-opacity="{0.12 + 0.88 * (value - least) / span:.3f}"' if known else 'fill-opacity="0"'
            title = f"{name}, layer {layer}: {value:.4g}" if known else f"{name}, layer {layer}: not known"
            parts.append(
                f'<rect class="cell" x="{LABELS + layer * CELL}" y="{top}" width="{CELL - 2}" height="{CELL - 2}"'
                f" {shade}><title>{escape(title)}</title></rect>"
            )
    for layer in _some(count):
        x = LABELS + layer * CELL + CELL / 2 - 1
        parts.append(f'<text class="text" x="{x:.1f}" y="{height - 14}" text-anchor="middle">{layer}</text>')
    return "".join([*parts, "</svg>"])


def _runs(points: Sequence[tuple[float, float] | None]) -> list[str]:
    """The stretches of points without gaps, as SVG says points."""
    runs: list[list[str]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(f"{point[0]:.1f},{point[1]:.1f}")
    return [" ".join(run) for run in runs if len(run) > 1]


def _some(count: int) -> list[int]:
    """At most nine layers to number, evenly apart."""
    step = max(1, -(-count // 9))
    return list(range(0, count, step))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to six of them, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between where there are few, from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, max(last, first + 1) + 1) for factor in factors]
    below = [tick for tick in ticks if tick <= low * (1 + 1e-9)] or ticks[:1]
    above = [tick for tick in ticks if tick >= high * (1 - 1e-9)] or ticks[-1:]
    found = [tick for tick in ticks if below[-1] <= tick <= above[0]]
    return found if len(found) > 1 else [below[-1], below[-1] * 10]
