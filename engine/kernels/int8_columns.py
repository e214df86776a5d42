# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
# ruff: noqa: RUF005  (Gluon has no unpacking)
"""y = x W^T with int8 x and W for 9 to 256 rows of x on sm_90, as fast as W can be read.

As `dense_columns`: y^T = W x^T from a ring of tiles in shared memory, W asked for before the kernels that make x have
ended, steps shared out over the card (`shared_steps`). Sums are int32, exact in any order, so the bits are those of
every other int8 product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels import dependent_launch, splits
from engine.kernels.device import Device, facts
from engine.kernels.shared_steps import combine, next_step, thread_barrier
from engine.kernels.tuning import Config

FEWEST_ROWS, MOST_ROWS = 9, 256
# What the rings of all programs of a multiprocessor may take of its 227 KB of shared memory: the rest is for barriers,
# for turning y, and for the small kernels that start while this one ends.
RING_BYTES = 196_608
# A name that Triton changed after 3.6.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def runs(m: int, n: int, k: int, device: Device) -> bool:
    """Whether this kernel can do a product here: rows of x, W and y must begin at whole 16 bytes."""
    return (
        FEWEST_ROWS <= m <= MOST_ROWS
        and device.capability[0] == 9
        and k % 16 == 0
        and n % 8 == 0
        and -(-n // 64) * -(-m // 16) <= splits.TILES
        and -(-n // 64) * -(-m // 16) * -(-k // 128) * 2 * device.multiprocessors < 2**31
    )


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries.

    block_n rows of W, block_m rows of x and block_k inputs a step; `share` programs a multiprocessor, each with a ring
    of `slots` steps.
    """
    if not runs(m, n, k, device):
        return []
    block_m = max(16, min(128, 1 << (m - 1).bit_length()))
    if m <= 32:
        shapes = [(64, 256, 4, 1), (64, 128, 4, 2), (64, 256, 4, 2), (128, 128, 4, 1), (128, 128, 4, 2)]
        shapes += [(128, 256, 4, 1), (64, 128, 4, 3)]
    elif m <= 64:
        shapes = [(128, 128, 4, 1), (128, 128, 4, 2), (128, 128, 8, 1), (128, 256, 8, 1), (256, 128, 8, 1)]
        shapes += [(64, 256, 4, 1), (64, 128, 4, 2)]
    else:
        shapes = [(256, 128, 8, 1), (128, 128, 8, 1), (128, 256, 8, 1), (64, 256, 4, 1), (64, 128, 4, 2)]
    return [
        {
            "kernel": "shared",
            "block_n": block_n,
            "block_m": block_m,
            "block_k": block_k,
            "share": share,
            "slots": min(12, RING_BYTES // share // ((block_n + block_m) * block_k)),
            "warps": warps,
        }
        for block_n, block_k, warps, share in shapes
    ]


def run(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config,
) -> Tensor:
    """`int8_linear` of x [m, k] and weight [n, k]; rows of weight must begin at whole 16 bytes."""
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # the copy engine reads from whole 16 bytes
    block_n, block_m, block_k = config["block_n"], config["block_m"], config["block_k"]
    columns, blocks, steps = -(-n // block_n), -(-m // block_m), -(-k // block_k)
    partials, arrivals = splits.buffers(x.device)
    programs = min(
        config["share"] * facts(x.device).multiprocessors,
        columns * blocks * steps,
        splits.PARTIAL_FLOATS // (2 * block_n * block_m),
    )
    x_desc, w_desc = (
        TensorDescriptor.from_tensor(
            tensor, [rows, block_k], gl.NVMMASharedLayout.get_default_for([rows, block_k], gl.int8)
        )
        for tensor, rows in ((x, block_m), (weight, block_n))
    )
    _columns[(programs,)](
        x_desc,
        w_desc,
        x_scales,
        weight_scales,
        y if bias is None else bias,
        y,
        partials.view(torch.int32),
        arrivals,
        m,
        n // 8,
        columns,
        blocks,
        steps,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        SLOTS=config["slots"],
        num_warps=config["warps"],
        **dependent_launch.options(facts(x.device)),
    )
    return y


@gluon.constexpr_function
def _doubles(start, end, before, after):
    """Of a layout: [*before, start, *after], then twice start ... below end."""
    found = []
    while start < end:
        found.append(before + [start] + after)
        start *= 2
    return found


@gluon.constexpr_function
def _out_layout(block_m, block_n, warps):
    """Of y [block_m, block_n]: a warp keeps its 16 columns of every tile, a thread 8 of them, 16 bytes."""
    tokens = _doubles(1, block_m, [], [0])
    registers = [[0, 1], [0, 2], [0, 4]] + tokens[4:] + _doubles(16 * warps, block_n, [0], [])
    warp_bases = _doubles(16, 16 * warps, [0], [])
    return gl.DistributedLinearLayout(registers, [[0, 8]] + tokens[:4], warp_bases, [], [block_m, block_n])


@gluon.jit(do_not_specialize=["m", "eighths", "columns", "blocks", "steps"])
def _columns(
    x_desc,
    w_desc,
    x_scales,
    w_scales,
    bias_ptr,
    y_ptr,
    partials,
    arrivals,
    m,
    eighths,
    columns,
    blocks,
    steps,
    HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SLOTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """A share of the steps of all tiles of y^T [BLOCK_N, BLOCK_M], the blocks of x over one column side by side.

    eighths: outputs, in eights, so that the compiler knows that rows of y begin at whole 16 bytes.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 32])
    n = eighths * 8
    program, programs = gl.program_id(0), gl.num_programs(0)
    all_steps = columns * blocks * steps
    start, end = program * all_steps // programs, (program + 1) * all_steps // programs

    w_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, BLOCK_N, BLOCK_K], w_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.int8, [SLOTS, BLOCK_M, BLOCK_K], x_desc.layout)
    # Barriers for each operand: the compiler parts copies that count on one array by a barrier of all warps.
    w_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    described = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(w_full.index(slot), count=1)
        mbarrier.init(x_full.index(slot), count=1)
    mbarrier.init(described, count=1)
    fence_async_shared()
    thread_barrier()
    # The step that is fetched next. W is asked for before the kernels that make x have ended.
    tokens, inputs = blocks * BLOCK_M, steps * BLOCK_K
    row, token = start // steps // blocks * BLOCK_N, start // steps % blocks * BLOCK_M
    inner = start % steps * BLOCK_K
    w_row, w_token, w_inner = row, token, inner
    for slot in range(gl.minimum(end - start, SLOTS)):
        mbarrier.expect(w_full.index(slot), w_desc.block_type.nbytes)
        load_tile(w_desc, [w_row, w_inner], w_full.index(slot), w_ring.index(slot))
        w_row, w_token, w_inner = next_step(w_row, w_token, w_inner, tokens, inputs, BLOCK_N, BLOCK_M, BLOCK_K)
    # x's descriptor is fetched as well, by asking for a tile past all rows: zeros, for which nothing is read.
    mbarrier.expect(described, x_desc.block_type.nbytes)
    load_tile(x_desc, [tokens, 0], described, x_ring.index(0))
    if PDL:
        dependent_launch.depend()
    mbarrier.wait(described, 0)
    for slot in range(gl.minimum(end - start, SLOTS)):
        mbarrier.expect(x_full.index(slot), x_desc.block_type.nbytes)
        load_tile(x_desc, [token, inner], x_full.index(slot), x_ring.index(slot))
        row, token, inner = next_step(row, token, inner, tokens, inputs, BLOCK_N, BLOCK_M, BLOCK_K)

    spot, phase, freed = 0, 0, 0
    for tile in range(start // steps, (end - 1) // steps + 1):
        first, last = gl.maximum(start, tile * steps), gl.minimum(end, (tile + 1) * steps)
        total = gl.zeros([BLOCK_N, BLOCK_M], gl.int32, MMA)
        for step in range(first, last):
            mbarrier.wait(w_full.index(spot), phase)
            mbarrier.wait(x_full.index(spot), phase)
            total = warpgroup_mma(w_ring.index(spot), x_ring.index(spot).permute([1, 0]), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            # The product before this one has ended: when all warps have come here, its slot is free.
            thread_barrier()
            ask = (step > start) & (step + SLOTS - 1 < end)
            mbarrier.expect(w_full.index(freed), w_desc.block_type.nbytes, pred=ask)
            mbarrier.expect(x_full.index(freed), x_desc.block_type.nbytes, pred=ask)
            load_tile(w_desc, [row, inner], w_full.index(freed), w_ring.index(freed), pred=ask)
            load_tile(x_desc, [token, inner], x_full.index(freed), x_ring.index(freed), pred=ask)
            if ask:
                row, token, inner = next_step(row, token, inner, tokens, inputs, BLOCK_N, BLOCK_M, BLOCK_K)
            freed = spot
            spot = gl.where(freed == SLOTS - 1, 0, freed + 1)
            phase = gl.where(freed == SLOTS - 1, phase ^ 1, phase)
        total = warpgroup_mma_wait(0, deps=[total])

        row_inside = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        token_inside = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
        place = (row_inside * BLOCK_M)[:, None] + token_inside[None, :]
        total, complete = combine(
            total, place, partials, arrivals, tile, steps, first, last, all_steps, BLOCK_N * BLOCK_M
        )
        if complete:
            y_row, y_token = tile // blocks * BLOCK_N + row_inside, tile % blocks * BLOCK_M + token_inside
            w_scale = gl.load(w_scales + y_row, mask=y_row < n, other=0.0)
            x_scale = gl.load(x_scales + y_token, mask=y_token < m, other=0.0)
            scaled = total.to(gl.float32) * x_scale[None, :] * w_scale[:, None]
            if HAS_BIAS:
                scaled += gl.load(bias_ptr + y_row, mask=y_row < n, other=0.0).to(gl.float32)[:, None]
            OUT: gl.constexpr = _out_layout(BLOCK_M, BLOCK_N, gl.num_warps())
            y = gl.convert_layout(scaled.to(y_ptr.dtype.element_ty).permute([1, 0]), OUT)
            out_token = tile % blocks * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
            out_row = tile // blocks * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, OUT))
            mask = (out_token < m)[:, None] & (out_row < n)[None, :]
            gl.store(y_ptr + out_token.to(gl.int64)[:, None] * n + out_row[None, :], y, mask=mask)
