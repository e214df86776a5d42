import math

import pytest

from pipelines.evaluation.gates import LEAST_UNITS, judge, overall
from pipelines.evaluation.statistics import Estimate


def _estimate(low: float, value: float, high: float, units: int = 100) -> Estimate:
    return Estimate(value=value, low=low, high=high, num_units=units)


@pytest.mark.parametrize(
    ("bound", "verdict", "why"),
    [
        (1.10, "pass", "wholly within"),
        (1.03, "pass", "wholly within"),
        (1.025, "inconclusive", "straddles"),
        (1.02, "inconclusive", "straddles"),
        (1.00, "fail", "wholly beyond"),
    ],
)
def test_verdict_of_an_upper_bound(bound: float, verdict: str, why: str) -> None:
    (gate,) = judge({"perplexity_ratio_max": bound}, {"perplexity_ratio": _estimate(1.01, 1.02, 1.03)})
    assert gate.verdict == verdict
    assert why in gate.why
    assert gate.direction == "at most"


def test_an_inconclusive_gate_says_how_many_units_would_decide() -> None:
    (gate,) = judge({"kl_mean_max": 3.0}, {"kl_mean": _estimate(1.0, 2.5, 4.0)})
    assert gate.why.endswith("about 900 units would decide")


@pytest.mark.parametrize(("bound", "verdict"), [(0.90, "pass"), (0.93, "inconclusive"), (0.95, "fail")])
def test_verdict_of_a_lower_bound(bound: float, verdict: str) -> None:
    (gate,) = judge({"top1_agreement_min": bound}, {"top1_agreement": _estimate(0.91, 0.93, 0.94)})
    assert (gate.verdict, gate.direction) == (verdict, "at least")


def test_too_few_units_can_fail_but_not_pass() -> None:
    few = {"kl_mean": _estimate(0.01, 0.02, 0.03, units=LEAST_UNITS - 1)}
    (gate,) = judge({"kl_mean_max": 1.0}, few)
    assert gate.verdict == "inconclusive"
    assert "7 units" in gate.why
    assert judge({"kl_mean_max": 0.001}, few)[0].verdict == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_fails(value: float) -> None:
    (gate,) = judge({"kl_mean_max": 1.0}, {"kl_mean": _estimate(math.nan, value, math.nan)})
    assert gate.verdict == "fail"


def test_a_gate_on_what_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'answer_flips_max' bounds nothing that was measured.*kl_mean"):
        judge({"answer_flips_max": 0.1}, {"kl_mean": _estimate(0, 0, 0)})
    with pytest.raises(ValueError, match="'kl_mean'"):
        judge({"kl_mean": 0.1}, {"kl_mean": _estimate(0, 0, 0)})


def test_overall_verdict() -> None:
    metrics = {"a": _estimate(1, 2, 3)}
    passing, open_, failing = (judge({"a_max": bound}, metrics) for bound in (4, 2, 0))
    assert overall(passing) == "pass"
    assert overall(passing + open_) == "inconclusive"
    assert overall(passing + open_ + failing) == "fail"
    assert overall([]) == "inconclusive", "without a gate nothing was proved"
