# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""y = x W^T + b with 4-bit weights: which kernel runs a product, and the kernels in plain Triton.

Any card and any group size runs through plain Triton. A card that can runs few rows by `int4_gemv` or `int4_stream`
and, from sm_90, more rows by `int4_gluon`; many rows run as one dense product after `dequantize`.
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
from engine.kernels.activation import silu_and_mul
from engine.kernels.device import Device, facts
from engine.kernels.int4_weights import TILE_ROWS, Int4Weights
from engine.kernels.tuning import Config

# Above this many rows of x a dense product of dequantized weights is faster, on a card without a table.
DENSE_ROWS = 256
# In Gluon, the first that can do a product being the default.
FRAGMENT_KERNELS = ("gemv", "gluon", "stream")


def int4_linear(
    x: Tensor, weights: Int4Weights, bias: Tensor | None = None, config: Config | None = None, *, gated: bool = False
) -> Tensor:
    """x W^T + bias for x [..., in] float16 or bfloat16; [..., out] of x's type.

    With `gated` the outputs are those of gate and up `in_turns`, and the result is silu(gate) * up [..., out / 2].

    The same inputs give the same bits, and so does a row in any batch that runs by the same configuration. `config`
    overrides the table of the device; see `default_config` for what it says.
    """
    rows = x.reshape(-1, weights.in_features)
    m = rows.shape[0]
    outputs = weights.out_features // 2 if gated else weights.out_features
    if m == 0:
        return x.new_empty(*x.shape[:-1], outputs)
    device = facts(x.device)
    if config is None:
        config = tuning.lookup("int4_linear", device.name, weights.out_features, weights.in_features, m)
    if config is None or not runs(config, m, x.dtype, weights, device):
        config = default_config(m, x.dtype, weights, device)
    kernel = config["kernel"]
    if kernel in FRAGMENT_KERNELS:
        y: Tensor = fragment_kernels(device)[kernel].run(rows, weights, bias, config, gated=gated)
    else:
        if kernel == "dense":
            y = torch.nn.functional.linear(rows, dequantize(weights, x.dtype), bias)
        else:
            y = run(rows, weights, bias, config)
        y = silu_and_mul(y, in_turns=True) if gated else y
    return y.reshape(*x.shape[:-1], outputs)


def gated_int4_linear(x: Tensor, weights: Int4Weights, bias: Tensor | None = None) -> Tensor:
    """`int4_linear` of gate and up with their activation."""
    return int4_linear(x, weights, bias, gated=True)


def runs(config: Config, m: int, dtype: torch.dtype, weights: Int4Weights, device: Device) -> bool:
    """Whether the configuration's kernel can do this product here."""
    kernel = config["kernel"]
    if kernel not in FRAGMENT_KERNELS:
        return True
    modules = fragment_kernels(device)
    return kernel in modules and bool(modules[kernel].runs(m, dtype, weights, device))


@functools.cache
def fragment_kernels(device: Device) -> dict[str, ModuleType]:
    """The modules of the kernels in Gluon by name, where the card and this Triton have what they need."""
    if device.capability < (8, 0):
        return {}
    try:
        return {kernel: importlib.import_module(f"engine.kernels.int4_{kernel}") for kernel in FRAGMENT_KERNELS}
    except ImportError:  # Gluon is experimental: a Triton whose Gluon is another one runs the plain kernels
        return {}


def default_config(m: int, dtype: torch.dtype, weights: Int4Weights, device: Device) -> Config:
    """The configuration of a product that no table knows.

    kernel: one of FRAGMENT_KERNELS, triton or dense. For triton: block_n rows of W and block_m rows of x a program, the
    sum over inputs split among `splits` programs, warps a program, stages of the pipeline.
    """
    if m > DENSE_ROWS:
        return {"kernel": "dense"}
    for module in fragment_kernels(device).values():
        if module.runs(m, dtype, weights, device):
            return dict(module.default_config(m, weights, device))
    block_m = max(16, min(64, triton.next_power_of_2(m)))
    tiles = -(-weights.out_features // TILE_ROWS) * -(-m // block_m)
    wanted = 4 * device.multiprocessors // tiles
    return {"kernel": "triton", "block_n": 64, "block_m": block_m, "splits": max(1, wanted), "warps": 4, "stages": 3}


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries for a product of m rows."""
    found: list[Config] = []
    if m >= 128:
        found.append({"kernel": "dense"})
    if m <= 512:
        block_m = max(16, min(128, triton.next_power_of_2(m)))
        tiles = -(-n // TILE_ROWS) * -(-m // block_m)
        for block_n in (64, 128):
            for parts in splits.near(tiles, device.multiprocessors, (1, 3)):
                for stages in (3,):
                    found.append(
                        {
                            "kernel": "triton",
                            "block_n": block_n,
                            "block_m": block_m,
                            "splits": parts,
                            "warps": 4 if block_n == 64 else 8,
                            "stages": stages,
                        }
                    )
    fast = [config for module in fragment_kernels(device).values() for config in module.candidates(m, n, k, device)]
    return fast + found


def run(x: Tensor, weights: Int4Weights, bias: Tensor | None, config: Config) -> Tensor:
    """The product by `_int4_gemm`; x [M, in]."""
    m, n, tile_inputs = x.shape[0], weights.out_features, weights.words.shape[1]
    x = x.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_n, block_m = config["block_n"], config["block_m"]
    grid_n, grid_m = -(-n // block_n), -(-m // block_m)
    parts = splits.fitting(config["splits"], grid_n * grid_m, block_n * block_m, tile_inputs)
    partials, arrivals = splits.buffers(x.device)
    _int4_gemm[(grid_n, grid_m, parts)](
        x,
        weights.words,
        weights.scale_zero,
        y if bias is None else bias,
        y,
        partials,
        arrivals,
        m,
        n,
        weights.in_features,
        tile_inputs,
        GROUP=weights.group_size,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        SPLITS=parts,
        num_warps=config["warps"],
        num_stages=config["stages"],
        **dependent_launch.options(facts(x.device)),
    )
    return y


def dequantize(weights: Int4Weights, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] of `dtype`: (q - z) * s in float32, rounded once."""
    out = torch.empty(weights.out_features, weights.in_features, dtype=dtype, device=weights.words.device)
    tiles, tile_inputs = weights.words.shape[:2]
    _dequantize[(tile_inputs, tiles)](
        weights.words,
        weights.scale_zero,
        out,
        weights.out_features,
        weights.in_features,
        tile_inputs,
        GROUP=weights.group_size,
        num_warps=4,
    )
    return out


@triton.jit
def _dense_tile(words_ptr, scale_zero_ptr, row, tile, tile_inputs, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """float32 (q - z) * s [ROWS, 128] of the rows `row` [ROWS] and of inputs 128 * tile and up."""
    GROUPS: tl.constexpr = 128 // GROUP
    # Word (row, c) with c = 8h + 4a + t: see Int4Weights.
    c = tl.arange(0, 16)
    tile_row = (row // 64).to(tl.int64)
    lane = row % 64 // 16 * 128 + row % 8 * 16 + row // 8 % 2 * 2
    column = c // 4 % 2 * 512 + c % 4 * 4 + c // 8
    words = tl.load(words_ptr + ((tile_row * tile_inputs + tile) * 1024 + lane)[:, None] + column[None, :])
    # [ROWS, h, i, (a, t), e] is [ROWS, inputs in their order].
    words = tl.reshape(words, [ROWS, 2, 1, 8, 1])
    i = tl.reshape(tl.arange(0, 4), [1, 1, 4, 1, 1])
    e = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2])
    q = tl.reshape((words >> (4 * i + 16 * e)) & 15, [ROWS, GROUPS, GROUP])
    group = tl.arange(0, GROUPS)
    pairs = row % 64 // 16 * 16 + row % 8 * 2 + row // 8 % 2
    first = (tile_row * tile_inputs + tile) * (GROUPS * 64) + pairs
    scale_zero = tl.load(scale_zero_ptr + first[:, None] + group[None, :] * 64)[:, :, None]
    scale = (scale_zero & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (scale_zero >> 16) & 15
    return tl.reshape((q - zero).to(tl.float32) * scale, [ROWS, 128])


@triton.jit(do_not_specialize=["m", "n", "tile_inputs"])
def _int4_gemm(
    x_ptr,
    words_ptr,
    scale_zero_ptr,
    bias_ptr,
    y_ptr,
    partials,
    arrivals,
    m,
    n,
    k,
    tile_inputs,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of y^T = W x^T, or a part of its sum: W is the left operand, so that few rows of x waste little."""
    column, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # A tile past the last one reads the last: its rows are not stored.
    held = tl.minimum(row, (n + 63) // 64 * 64 - 1)
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, 128)
    x_rows = x_ptr + token.to(tl.int64)[None, :] * k
    if PDL:
        dependent_launch.depend()
    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for tile in range(split * tile_inputs // SPLITS, (split + 1) * tile_inputs // SPLITS):
        w = _dense_tile(words_ptr, scale_zero_ptr, held, tile, tile_inputs, BLOCK_N, GROUP).to(x_ptr.dtype.element_ty)
        inputs = tile * 128 + inner[:, None]
        x = tl.load(x_rows + inputs, mask=(inputs < k) & (token < m)[None, :], other=0.0)
        total = tl.dot(w, x, total)
    last = True
    if SPLITS > 1:
        place = block * tl.num_programs(0) + column
        total, last = splits.combine(total, partials, arrivals, place, split, SPLITS, BLOCK_N, BLOCK_M)
    if last:
        if HAS_BIAS:
            total += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
        y = tl.trans(total).to(y_ptr.dtype.element_ty)
        tl.store(
            y_ptr + token.to(tl.int64)[:, None] * n + row[None, :], y, mask=(token < m)[:, None] & (row < n)[None, :]
        )


@triton.jit(do_not_specialize=["n", "tile_inputs"])
def _dequantize(words_ptr, scale_zero_ptr, out_ptr, n, k, tile_inputs, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    row = tl.program_id(1) * 64 + tl.arange(0, 64)
    inputs = tile * 128 + tl.arange(0, 128)
    w = _dense_tile(words_ptr, scale_zero_ptr, row, tile, tile_inputs, 64, GROUP).to(out_ptr.dtype.element_ty)
    place = out_ptr + row.to(tl.int64)[:, None] * k + inputs[None, :]
    tl.store(place, w, mask=(row < n)[:, None] & (inputs < k)[None, :])
