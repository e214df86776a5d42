# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""y = x W^T with int8 x and W: an exact integer sum, then the scales of x's rows and of W's rows and the bias.

Where a table chooses them, `int8_gemv` runs up to four rows of x and `int8_columns` 9 to 256. Else few run by
`_int8_columns`, W being the left operand and the sum split among programs: its time is that of reading W. Many run by
`_int8_tiles`, persistent programs fed by the copy engine (sm_90 and newer).
(Above 300 lines: two kernels of one product, and the choice between them.)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import dependent_launch, splits, tuning
from engine.kernels.device import Device, facts
from engine.kernels.tuning import Config

# Up to this many rows of x, W is the left operand, on a card without a table.
FEW_ROWS = 128


def int8_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """(x weight^T) * x_scales * weight_scales + bias as float16 or bfloat16 `dtype`, rounded once; [M, N].

    x int8 [M, K] with x_scales float32 [M], weight int8 [N, K] with weight_scales float32 [N].
    `config` overrides the table of the device; see `default_config`.
    """
    m, k = x.shape
    n = weight.shape[0]
    if m == 0:
        return torch.empty(0, n, dtype=dtype, device=x.device)
    device = facts(x.device)
    if config is None:
        config = tuning.lookup("int8_linear", device.name, n, k, m)
    x, weight = x.contiguous(), weight.contiguous()
    unaligned = config is not None and config["kernel"] == "shared" and weight.data_ptr() % 16 != 0
    if config is None or unaligned or not runs(config, m, n, k, device):
        config = default_config(m, n, k, device)
    if config["kernel"] == "gemv":
        gemv = gemv_module(device)
        assert gemv is not None, "a configuration that does not run here"
        y: Tensor = gemv.multiply_codes(x, x_scales, weight, weight_scales, bias, dtype, config)
        return y
    if config["kernel"] == "shared":
        columns = columns_module(device)
        assert columns is not None, "a configuration that does not run here"
        shared: Tensor = columns.run(x, x_scales, weight, weight_scales, bias, dtype, config)
        return shared
    run = {"columns": _run_columns, "tiles": _run_tiles, "library": _run_library}[config["kernel"]]
    return run(x, x_scales, weight, weight_scales, bias, dtype, config)


@functools.cache
def gemv_module(device: Device) -> ModuleType | None:
    """`int8_gemv`, where the card and this Triton have what it needs."""
    if device.capability < (8, 0):
        return None
    try:
        return importlib.import_module("engine.kernels.int8_gemv")
    except ImportError:  # Gluon is experimental: a Triton whose Gluon is another one runs the plain kernels
        return None


@functools.cache
def columns_module(device: Device) -> ModuleType | None:
    """`int8_columns`, where the card and this Triton have what it needs."""
    if device.capability[0] != 9:
        return None
    try:
        return importlib.import_module("engine.kernels.int8_columns")
    except ImportError:  # as above
        return None


def runs(config: Config, m: int, n: int, k: int, device: Device) -> bool:
    """Whether the configuration's kernel can do this product here."""
    if config["kernel"] == "shared":
        columns = columns_module(device)
        return columns is not None and bool(columns.runs(m, n, k, device))
    if config["kernel"] == "gemv":
        gemv = gemv_module(device)
        return gemv is not None and bool(gemv.runs(m, k, device))
    if config["kernel"] == "tiles":
        return device.capability >= (9, 0) and k % 16 == 0
    if config["kernel"] == "library":
        return device.capability >= (8, 0) and m > 16 and n % 8 == 0 and k % 8 == 0
    return True


def default_config(m: int, n: int, k: int, device: Device) -> Config:
    """The configuration of a product that no table knows.

    kernel columns: block_n rows of W, block_m rows of x and block_k inputs a step, `splits` programs a sum.
    kernel tiles: blocks likewise; group_m blocks of x's rows follow one another over the same rows of W.
    kernel library: torch._int_mm, and the scales in a pass of their own.
    """
    if m > FEW_ROWS:
        tiles = {
            "kernel": "tiles",
            "block_m": 128,
            "block_n": 256 if m >= 512 else 128,
            "block_k": 128,
            "group_m": 8,
            "warps": 8,
            "stages": 3,
        }
        if runs(tiles, m, n, k, device):
            return tiles
    block_m = max(16, min(128, triton.next_power_of_2(m)))
    count = -(-n // 64) * -(-m // block_m)
    return {
        "kernel": "columns",
        "block_n": 64,
        "block_m": block_m,
        "block_k": 256 if block_m <= 32 else 128,
        "splits": max(1, 3 * device.multiprocessors // count),
        "warps": 4,
        "stages": 3,
    }


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries for a product of m rows."""
    gemv = gemv_module(device)
    found: list[Config] = list(gemv.candidates(m, device)) if gemv is not None else []
    columns = columns_module(device)
    found += columns.candidates(m, n, k, device) if columns is not None else []
    if m <= 512:
        block_m = max(16, min(128, triton.next_power_of_2(m)))
        for block_n, warps in ((64, 4), (128, 8), (128, 4)):
            count = -(-n // block_n) * -(-m // block_m)
            for block_k, stages in ((128, 4), (128, 6), (256, 3), (256, 4)):
                if (block_n + block_m) * block_k * stages > 200_000 or (block_k == 256 and block_m > 64):
                    continue
                for parts in splits.near(count, device.multiprocessors, (1, 3)):
                    found.append(
                        {
                            "kernel": "columns",
                            "block_n": block_n,
                            "block_m": block_m,
                            "block_k": block_k,
                            "splits": parts,
                            "warps": warps,
                            "stages": stages,
                        }
                    )
    if m >= 64:
        for block_m, block_n, warps in ((64, 256, 8), (128, 128, 8), (128, 128, 4), (128, 256, 8), (64, 128, 4)):
            for stages in (3, 4):
                found.append(
                    {
                        "kernel": "tiles",
                        "block_m": block_m,
                        "block_n": block_n,
                        "block_k": 128,
                        "group_m": 8,
                        "warps": warps,
                        "stages": stages,
                    }
                )
        found.append({"kernel": "library"})
    return [config for config in found if runs(config, m, n, k, device)]


def _run_columns(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype, c: Config
) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    block_n, block_m, block_k = c["block_n"], c["block_m"], c["block_k"]
    grid_n, grid_m, steps = -(-n // block_n), -(-m // block_m), -(-k // block_k)
    parts = splits.fitting(c["splits"], grid_n * grid_m, block_n * block_m, steps)
    partials, arrivals = splits.buffers(x.device)
    _int8_columns[(grid_n, grid_m, parts)](
        x,
        x_scales,
        weight,
        w_scales,
        y if bias is None else bias,
        y,
        partials.view(torch.int32),
        arrivals,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        SPLITS=parts,
        PREFETCHED=triton.next_power_of_2(c["stages"] * block_k),
        num_warps=c["warps"],
        num_stages=c["stages"],
        **dependent_launch.options(facts(x.device)),
    )
    return y


def _run_tiles(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype, c: Config
) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    device = facts(x.device)
    block_n, block_m, block_k = c["block_n"], c["block_m"], c["block_k"]
    programs = min(device.multiprocessors, -(-n // block_n) * -(-m // block_m))
    _int8_tiles[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        x_scales,
        TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        w_scales,
        y if bias is None else bias,
        y,
        m,
        n,
        k,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        GROUP_M=c["group_m"],
        num_warps=c["warps"],
        num_stages=c["stages"],
        **dependent_launch.options(device),
    )
    return y


def _run_library(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, bias: Tensor | None, dtype: torch.dtype, c: Config
) -> Tensor:
    total = torch._int_mm(x, weight.t())
    m, n = total.shape
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    _scale[(m, -(-n // 2048))](
        total, x_scales, w_scales, y if bias is None else bias, y, n, HAS_BIAS=bias is not None, BLOCK=2048, num_warps=8
    )
    return y


@triton.jit(do_not_specialize=["m"])
def _int8_columns(
    x_ptr,
    x_scales,
    w_ptr,
    w_scales,
    bias_ptr,
    y_ptr,
    partials,
    arrivals,
    m,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of y^T = W x^T, or a part of its sum."""
    column, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = column * BLOCK_N + tl.arange(0, BLOCK_N)
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    steps = tl.cdiv(k, BLOCK_K)
    first, end = split * steps // SPLITS, (split + 1) * steps // SPLITS
    # Rows past the last are read as the last and not stored, so that W needs no mask of rows.
    w_rows = w_ptr + tl.minimum(row, n - 1).to(tl.int64)[:, None] * k
    x_rows = x_ptr + tl.minimum(token, m - 1).to(tl.int64)[None, :] * k
    if PDL:
        line = first * BLOCK_K + tl.arange(0, PREFETCHED // 128) * 128
        dependent_launch.prefetch(w_rows + tl.minimum(line, k - 1)[None, :])
        dependent_launch.depend()
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    for step in range(first, end):
        inputs = step * BLOCK_K + tl.arange(0, BLOCK_K)
        w = tl.load(w_rows + inputs[None, :], mask=(inputs < k)[None, :], other=0)
        x = tl.load(x_rows + inputs[:, None], mask=(inputs < k)[:, None], other=0)
        total = tl.dot(w, x, total, out_dtype=tl.int32)
    last = True
    if SPLITS > 1:
        tile = block * tl.num_programs(0) + column
        total, last = splits.combine(total, partials, arrivals, tile, split, SPLITS, BLOCK_N, BLOCK_M)
    if last:
        w_scale = tl.load(w_scales + row, mask=row < n, other=0.0)
        x_scale = tl.load(x_scales + token, mask=token < m, other=0.0)
        y = total.to(tl.float32) * x_scale[None, :] * w_scale[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        y = tl.trans(y).to(y_ptr.dtype.element_ty)
        place = y_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
        tl.store(place, y, mask=(token < m)[:, None] & (row < n)[None, :])


@triton.jit(do_not_specialize=["m"])
def _int8_tiles(
    x_desc,
    x_scales,
    w_desc,
    w_scales,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of y, each program taking every num_programs-th; GROUP_M blocks of x share W's blocks in the L2 cache."""
    if PDL:
        dependent_launch.depend()
    grid_m, grid_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), grid_m * grid_n, tl.num_programs(0), flatten=True):
        group = tile // (GROUP_M * grid_n)
        height = tl.minimum(grid_m - group * GROUP_M, GROUP_M)
        first_token = (group * GROUP_M + tile % (GROUP_M * grid_n) % height) * BLOCK_M
        first_row = tile % (GROUP_M * grid_n) // height * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
        for step in range(tl.cdiv(k, BLOCK_K)):
            x = x_desc.load([first_token, step * BLOCK_K])
            w = w_desc.load([first_row, step * BLOCK_K])
            total = tl.dot(x, w.T, total, out_dtype=tl.int32)
        token = first_token + tl.arange(0, BLOCK_M)
        row = first_row + tl.arange(0, BLOCK_N)
        w_scale = tl.load(w_scales + row, mask=row < n, other=0.0)
        x_scale = tl.load(x_scales + token, mask=token < m, other=0.0)
        y = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[None, :]
        place = y_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=(token < m)[:, None] & (row < n)[None, :])


@triton.jit
def _scale(total_ptr, x_scales, w_scales, bias_ptr, y_ptr, n, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_ptr + token * n + row, mask=row < n, other=0)
    y = total.to(tl.float32) * tl.load(x_scales + token) * tl.load(w_scales + row, mask=row < n, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * n + row, y.to(y_ptr.dtype.element_ty), mask=row < n)
