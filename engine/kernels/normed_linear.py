"""Products of the RMS norm of the residual stream: in one kernel where rows are few, else a norm and a product."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from engine.kernels import int4_linear, tuning
from engine.kernels.device import Device, facts
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.norm import add_rms_norm
from engine.kernels.tuning import Config

# Up to so many rows are normed by the product, on a card without a table.
FEW_ROWS = 4
# More rows than that are never normed by the product, and need no row in a table.
MOST_ROWS = 8
# A norm and a product, each a kernel; the product runs by its own table.
APART = {"kernel": "apart"}


def normed_int4_linear(
    delta: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    weights: Int4Weights,
    bias: Tensor | None = None,
    config: Config | None = None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`int4_linear` of what `add_rms_norm` gives for delta and residual [M, in], and their sum [M, in].

    In one kernel the squares of a row are summed in another order, unless there are 512 inputs a warp: where sums
    differ in their last bit, so may some of the normed numbers. `config` overrides the table of the device.
    """
    m, device = len(delta), facts(delta.device)
    if config is None and m <= MOST_ROWS:
        config = tuning.lookup("normed_int4_linear", device.name, weights.out_features, weights.in_features, m)
    fused = _int4_kernel(device, m, delta.dtype, weights)
    if config is None and fused is not None and m <= FEW_ROWS:
        config = fused.default_config(device)
    if config is None or config["kernel"] == "apart" or fused is None:
        normed, total = add_rms_norm(delta, residual, norm, eps)
        return int4_linear.int4_linear(normed, weights, bias, gated=gated), total
    y, total = fused.run(delta, residual, norm, eps, weights, bias, config, gated=gated)
    return y, total


def int4_candidates(m: int, device: Device) -> Sequence[Config]:
    """The configurations of `normed_int4_linear` that tuning tries for m rows."""
    kernel = _int4_module(device)
    return [APART, *(kernel.candidates(m, device) if kernel is not None else ())]


def _int4_kernel(device: Device, m: int, dtype: torch.dtype, weights: Int4Weights) -> ModuleType | None:
    """The module of the one kernel, where it can do this product."""
    kernel = _int4_module(device)
    return kernel if kernel is not None and m and kernel.runs(m, dtype, weights, device) else None


@functools.cache
def _int4_module(device: Device) -> ModuleType | None:
    if "gemv" not in int4_linear.fragment_kernels(device):
        return None
    return importlib.import_module("engine.kernels.int4_normed_gemv")
