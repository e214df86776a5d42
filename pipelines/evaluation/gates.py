"""Gates: bounds on metrics, and the verdict that follows from them.

The rule, the same for every gate: **pass** if the whole confidence interval is within the bound, **fail** if all of it
is beyond, **inconclusive** if it straddles. An interval that rests on fewer than `LEAST_UNITS` units can fail but not
pass: it says more about the units than about the artifact. A metric that is not finite fails. The evaluation fails
if any gate does, is inconclusive if none fails and any is, and passes only if there are gates and all of them pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.evaluation.statistics import Estimate

Verdict = Literal["pass", "fail", "inconclusive"]
LEAST_UNITS = 8
"""Below 8 items a t interval trusts their likeness more than their number (its factor is over 2.36)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The outcome for one bound. `why` is a sentence for people."""

    metric: str
    value: float
    low: float
    high: float
    bound: float
    direction: Literal["at most", "at least"]
    verdict: Verdict
    why: str


def judge(bounds: Mapping[str, float], metrics: Mapping[str, Estimate]) -> list[Gate]:
    """One gate for each `<metric>_max` or `<metric>_min` of `bounds`, sorted by name. ValueError for another name, or
    for a metric that the evaluation set does not measure."""
    return [_judge(name, bounds[name], metrics) for name in sorted(bounds)]


def overall(gates: Sequence[Gate]) -> Verdict:
    """The verdict of the evaluation."""
    verdicts = {gate.verdict for gate in gates}
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts == {"pass"} else "inconclusive"


def _judge(name: str, bound: float, metrics: Mapping[str, Estimate]) -> Gate:
    metric, _, side = name.rpartition("_")
    if side not in ("max", "min") or metric not in metrics:
        allowed = ", ".join(sorted(metrics))
        raise ValueError(
            f"The gate {name!r} bounds nothing that was measured. A gate is a metric's name with _max or _min; measured"
            f" were: {allowed}. A gate on answers needs an evaluation set with questions."
        )
    estimate = metrics[metric]
    direction: Literal["at most", "at least"] = "at most" if side == "max" else "at least"
    verdict, why = _decide(estimate, bound, at_most=side == "max")
    return Gate(
        metric=metric,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        bound=bound,
        direction=direction,
        verdict=verdict,
        why=why,
    )


def _decide(estimate: Estimate, bound: float, *, at_most: bool) -> tuple[Verdict, str]:
    near, far = (estimate.high, estimate.low) if at_most else (estimate.low, estimate.high)
    within = near <= bound if at_most else near >= bound
    beyond = far > bound if at_most else far < bound
    interval = f"the interval {_number(estimate.low)} to {_number(estimate.high)}"
    limit = f"{'at most' if at_most else 'at least'} {_number(bound)}"
    if not math.isfinite(estimate.value):
        return "fail", "the metric is not a finite number"
    if beyond:
        return "fail", f"{interval} is wholly beyond the bound, {limit}"
    if estimate.num_units < LEAST_UNITS:
        return "inconclusive", f"it rests on {estimate.num_units} units; {LEAST_UNITS} are the fewest that can pass"
    if within:
        return "pass", f"{interval} is wholly within the bound, {limit}"
    return "inconclusive", f"{interval} straddles the bound, {limit}{_more_units(estimate, bound)}"


def _more_units(estimate: Estimate, bound: float) -> str:
    """How many units would decide, if the value stayed: an interval shrinks with their square root."""
    distance, half = abs(estimate.value - bound), (estimate.high - estimate.low) / 2
    if distance == 0 or not math.isfinite(half):
        return ""
    return f"; about {math.ceil(estimate.num_units * (half / distance) ** 2)} units would decide"


def _number(value: float) -> str:
    return f"{value:.6g}"
