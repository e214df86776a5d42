# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""y = x W^T + b in float16 or bfloat16: kernels of our own for few rows of x, the library for more.

Up to four rows run by `_dense_rows`, up to 256 on sm_90 by `dense_columns`; which, or the library, a table says.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import dependent_launch, tuning
from engine.kernels.device import Device, facts
from engine.kernels.tuning import Config

MOST_ROWS = 4


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x weight^T + bias for x [..., in] and weight [out, in] of one type, float16 or bfloat16; [..., out].

    `config` overrides the table of the device; see `default_config`.
    """
    n, k = weight.shape
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    device = facts(x.device)
    if config is None:
        config = tuning.lookup("dense_linear", device.name, n, k, m)
    if config is None or not runs(config, m, n, k, device):
        config = default_config(m, n, k, device)
    if config["kernel"] == "rows":
        return _run(rows, weight, bias, config).reshape(*x.shape[:-1], n)
    if config["kernel"] == "columns" and weight.is_contiguous() and weight.data_ptr() % 16 == 0:
        y: Tensor = _columns().run(rows, weight, bias, config)
        return y.reshape(*x.shape[:-1], n)
    return torch.nn.functional.linear(x, weight, bias)


def runs(config: Config, m: int, n: int, k: int, device: Device) -> bool:
    """Whether the configuration's kernel can do this product here."""
    if config["kernel"] == "columns":
        return device.capability[0] == 9 and bool(_columns().runs(config, m, n, k, device))
    return config["kernel"] == "library" or 1 <= m <= MOST_ROWS


def default_config(m: int, n: int, k: int, device: Device) -> Config:
    """The configuration of a product that no table knows.

    kernel rows: block_n rows of W a program, block_k inputs a step. kernel columns: see `dense_columns.candidates`.
    kernel library: torch's.
    """
    if m != 1:
        return {"kernel": "library"}
    return {"kernel": "rows", "block_n": 8 if n >= 8192 else 4, "block_k": 1024, "warps": 4}


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries for a product of m rows."""
    found: list[Config] = [{"kernel": "library"}]
    if m <= 2:
        shapes = [(4, 1024, 4), (4, 2048, 4), (4, 2048, 8), (8, 512, 4), (2, 4096, 4)]
        # More on its way at once.
        shapes += [(2, 4096, 8), (4, 4096, 8), (2, 8192, 8), (8, 2048, 8)]
    else:
        shapes = [(4, 1024, 4)] if m <= MOST_ROWS else []
    for block_n, block_k, warps in shapes:
        found.append({"kernel": "rows", "block_n": block_n, "block_k": block_k, "warps": warps})
    if device.capability[0] == 9:
        found.extend(_columns().candidates(m, n, k, device))
    return found


def _columns() -> Any:
    """`dense_columns`, which is in Gluon: what runs under Triton's interpreter does not import it."""
    return importlib.import_module("engine.kernels.dense_columns")


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _dense_rows[(-(-n // config["block_n"]),)](
        x.contiguous(),
        weight,
        y if bias is None else bias,
        y,
        n,
        k,
        weight.stride(0),
        M=m,
        HAS_BIAS=bias is not None,
        BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"],
        num_warps=config["warps"],
        **dependent_launch.options(facts(x.device)),
    )
    return y


@triton.jit
def _weights(w_rows, start, k, BLOCK_K: tl.constexpr):
    inputs = start + tl.arange(0, BLOCK_K)
    return tl.load(w_rows + inputs[None, :], mask=(inputs < k)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(w, x_ptr, start, k, BLOCK_K: tl.constexpr):
    inputs = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + inputs, mask=inputs < k, other=0.0)
    return w.to(tl.float32) * x.to(tl.float32)[None, :]


@triton.jit
def _finish(total, bias_ptr, y_ptr, row, n, HAS_BIAS: tl.constexpr):
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < n)


@triton.jit
def _dense_rows(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    n,
    k,
    w_stride,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of M (1 to 4) rows of x. One block of W is always on its way while the one before is used."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = w_ptr + tl.minimum(row, n - 1).to(tl.int64)[:, None] * w_stride
    w = _weights(w_rows, 0, k, BLOCK_K)
    if PDL:
        dependent_launch.depend()
    total0 = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    total1, total2, total3 = total0, total0, total0
    for start in range(0, k, BLOCK_K):
        following = _weights(w_rows, start + BLOCK_K, k, BLOCK_K)
        total0 += _product(w, x_ptr, start, k, BLOCK_K)
        if M > 1:
            total1 += _product(w, x_ptr + k, start, k, BLOCK_K)
        if M > 2:
            total2 += _product(w, x_ptr + 2 * k, start, k, BLOCK_K)
        if M > 3:
            total3 += _product(w, x_ptr + 3 * k, start, k, BLOCK_K)
        w = following
    _finish(total0, bias_ptr, y_ptr, row, n, HAS_BIAS)
    if M > 1:
        _finish(total1, bias_ptr, y_ptr + n, row, n, HAS_BIAS)
    if M > 2:
        _finish(total2, bias_ptr, y_ptr + 2 * n, row, n, HAS_BIAS)
    if M > 3:
        _finish(total3, bias_ptr, y_ptr + 3 * n, row, n, HAS_BIAS)
