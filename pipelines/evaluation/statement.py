"""The statement of an evaluation: an in-toto Statement (v1) whose subject is an artifact's id."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.evaluation.answers import Flips
from pipelines.evaluation.gates import Gate, overall
from pipelines.evaluation.statistics import Estimate

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:ingot:evaluation:v1"


def make_statement(
    *,
    artifact: str,
    name: str,
    recipe: Mapping[str, Any],
    baseline: str,
    toolchain: Mapping[str, Any],
    items: str,
    counts: Mapping[str, int],
    confidence: float,
    metrics: Mapping[str, Estimate],
    flips: Flips | None,
    sizes: Mapping[str, int],
    gates: Sequence[Gate],
    goldens: str,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """JSON values only, without times and paths: the same evaluation is the same bytes.

    `items` and `goldens` are digests, `baseline` is what the weights were that the artifact was compared with: fp16, or
    w4a16 where the checkpoint itself is quantized. `calibration` says by the digest of its blocks what the artifact was
    calibrated on and how much of that is asked here again; None for one that was not.
    A number that is not finite (an interval without an end) is null.
    """
    predicate: dict[str, Any] = {
        "evaluation": name,
        "recipe": dict(recipe),
        "baseline": {"weights": baseline},
        "device_class": toolchain["device"],
        "toolchain": dict(toolchain),
        "items": {"sha256": items, **counts},
        "calibration": None if calibration is None else dict(calibration),
        "confidence": confidence,
        "metrics": {metric: _finite(asdict(estimate)) for metric, estimate in metrics.items()},
        "answers": None if flips is None else asdict(flips),
        "sizes": dict(sizes),
        "gates": [_finite(asdict(gate)) for gate in gates],
        "verdict": overall(gates),
        "goldens": {"sha256": goldens},
    }
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": artifact, "digest": {"sha256": artifact}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
