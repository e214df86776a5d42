import math
from typing import Any

from engine.storage.artifacts import canonical_json
from pipelines.evaluation.gates import judge
from pipelines.evaluation.statement import make_statement
from pipelines.evaluation.statistics import Estimate

ID = "ab" * 32


def _statement(value: float) -> dict[str, Any]:
    metrics = {"kl_mean": Estimate(value=value, low=-math.inf, high=math.inf, num_units=1)}
    return make_statement(
        artifact=ID,
        name="e",
        recipe={"weights": "fp16"},
        baseline="w4a16",
        toolchain={"device": "cpu-avx2", "torch": "2"},
        items="cd" * 32,
        counts={"num_items": 1},
        confidence=0.95,
        metrics=metrics,
        flips=None,
        sizes={"artifact_bytes": 5},
        gates=judge({"kl_mean_max": 1.0}, metrics),
        goldens="ef" * 32,
        calibration={"blocks": "12" * 32, "seen_tokens": 3},
    )


def test_the_subject_is_the_id_and_the_verdict_that_of_the_gates() -> None:
    statement = _statement(0.5)
    assert statement["subject"] == [{"name": ID, "digest": {"sha256": ID}}]
    assert statement["predicate"]["verdict"] == "inconclusive"
    assert statement["predicate"]["device_class"] == "cpu-avx2"
    assert statement["predicate"]["calibration"] == {"blocks": "12" * 32, "seen_tokens": 3}
    assert statement["predicate"]["baseline"] == {"weights": "w4a16"}


def test_a_number_without_end_is_null_and_the_statement_stays_json() -> None:
    metric = _statement(0.5)["predicate"]["metrics"]["kl_mean"]
    assert metric == {"value": 0.5, "low": None, "high": None, "num_units": 1}
    broken = _statement(math.nan)
    assert broken["predicate"]["verdict"] == "fail"
    assert b"NaN" not in canonical_json(broken)
