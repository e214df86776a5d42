"""Which fields of conf/weights a recipe uses: those, and no others, enter its slices."""

from __future__ import annotations

from typing import Any

from pipelines.schema import Weights

# Weights that are taken from the checkpoint: nothing is computed, and calibration does not touch them.
UNCALIBRATED = ("fp16", "as_is")
# What each method of w4a16 uses beside the grid.
METHOD_FIELDS = {
    "rtn": (),
    "awq": ("clip", "activation_exponents", "weight_exponents"),
    "gptq": ("clip", "correction"),
    "awq+gptq": ("clip", "correction", "activation_exponents", "weight_exponents"),
}


def weights_part(weights: Weights) -> dict[str, Any]:
    """The part `weights` of a slice: the fields that its recipe and method use."""
    if weights.name in UNCALIBRATED:
        return {"name": weights.name}
    if weights.name == "w8a8":
        if weights.search == "none":  # the reference's formula, whose weights other engines read
            return _fields(weights, "name", "search", "alpha")
        rotated = {"rotate_down": weights.rotate_down} if weights.rotate_down else {}
        return _fields(weights, "name", "search", "alphas") | rotated
    head = {} if weights.head == "fp16" else {"head": weights.head}
    if weights.search == "none":
        return _fields(weights, "name", "group_size", "search", "alpha") | head
    fields = ("name", "group_size", "search", "method", "symmetric", *METHOD_FIELDS[weights.method])
    return _fields(weights, *fields) | head


def _fields(weights: Weights, *names: str) -> dict[str, Any]:
    return {name: getattr(weights, name) for name in names}
