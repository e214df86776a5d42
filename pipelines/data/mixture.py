"""How many blocks of a mixture come from each of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction


def shares(samples: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split `samples` among the parts in proportion to their weights: whole numbers that add up to it.

    Every part gets its proportion rounded down, and what is left goes, one each, to the largest fractions cut off, of
    equal ones to the first by name. ValueError for a part that would get none: it was named to be heard.
    """
    names = sorted(weights)
    total = sum(Fraction(weights[name]) for name in names)
    exact = {name: samples * Fraction(weights[name]) / total for name in names}
    found = {name: int(exact[name]) for name in names}
    left = samples - sum(found.values())
    for name in sorted(names, key=lambda name: (found[name] - exact[name], name))[:left]:
        found[name] += 1
    if none := [name for name in names if not found[name]]:
        raise ValueError(
            f"calibration.parts.{none[0]} gets no block: its weight {weights[none[0]]:g} of {float(total):g} is too "
            f"little for calibration.samples={samples}. Raise its weight or the samples, or take the part out."
        )
    return found
