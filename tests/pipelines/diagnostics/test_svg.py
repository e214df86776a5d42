import math
import re
from xml.etree import ElementTree

import pytest

from pipelines.diagnostics import svg


def points(text, kind="circle"):
    """(x, y) of every dot of a figure, which has to be XML."""
    tree = ElementTree.fromstring(text)
    return [(float(dot.get("cx")), float(dot.get("cy"))) for dot in tree.iter(kind)]


def test_larger_values_lie_higher_and_layers_go_to_the_right():
    dots = points(svg.lines({"a": [1.0, 10.0, 100.0]}, log=True, what="w"))
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    heights = [y for _, y in dots]
    # Powers of ten are evenly apart.
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2) and heights[0] > heights[2]


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    "values", [[0.5], [3e-7, 2e-7], [255.0] * 40, [1e-3, math.nan, 2e-3, math.inf, 1.0], [0.0, 5.0], [17.3, 1234.5]]
)
def test_every_dot_is_within_the_figure(values, log):
    text = svg.lines({"a & b": values, "c": values[::-1]}, log=log, what="<what>")
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    dots = points(text)
    assert len(dots) == 2 * len(finite)
    assert all(svg.LEFT - 1 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT - svg.BOTTOM + 1 for x, y in dots)
    ticks = re.findall(r'text-anchor="end">([^<]+)<', text)
    assert 2 <= len(ticks) <= 13 and [float(t) for t in ticks] == sorted(map(float, ticks))


def test_a_value_that_is_not_known_breaks_the_line():
    text = svg.lines({"a": [1.0, 2.0, math.nan, 3.0, 4.0]}, log=False, what="w")
    assert text.count("<polyline") == 2 and text.count("<circle") == 4
    assert "no values" in svg.lines({"a": [math.nan]}, log=True, what="w")


def test_a_map_is_darkest_where_the_value_is_largest():
    tree = ElementTree.fromstring(svg.heat({"q": [0.1, 0.3], "<k>": [0.2, math.nan]}, what="w"))
    shades = [float(cell.get("fill-opacity")) for cell in tree.iter("rect")]
    assert shades[1] == 1.0 and shades[1] > shades[2] > shades[0] > shades[3] == 0
    titles = [title.text for title in tree.iter("title")]
    assert titles == ["q, layer 0: 0.1", "q, layer 1: 0.3", "<k>, layer 0: 0.2", "<k>, layer 1: not known"]
    assert ElementTree.fromstring(svg.heat({"q": [0.5, 0.5]}, what="w")) is not None
