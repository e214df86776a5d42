# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
"""y = x W^T in float16 or bfloat16 for few rows of x on sm_90, as fast as W can be read.

y^T = W x^T: tiles of W and of x go by the copy engine to a ring in shared memory, from where asynchronous matrix
instructions take both. Every program takes an equal share of the steps of all columns: see `shared_steps`.
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

MOST_ROWS = 256
# What the rings of all programs of a multiprocessor may take of its 227 KB of shared memory: the rest is for barriers
# and for the small kernels that start while this one ends.
RING_BYTES = 204_800
# A name that Triton changed after 3.6.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def runs(config: Config, m: int, n: int, k: int, device: Device) -> bool:
    """Whether this kernel can do a product here. W's rows must begin at whole 16 bytes, as the copy engine reads."""
    columns, steps = -(-n // config["block_n"]), -(-k // config["block_k"])
    programs = config["share"] * device.multiprocessors
    tiles = columns * -(-m // config["block_m"])
    return (
        1 <= m <= MOST_ROWS
        and device.capability[0] == 9
        and k % 8 == 0
        and tiles <= splits.TILES
        and tiles * steps * programs < 2**31
    )


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries.

    block_n rows of W, block_m rows of x and block_k inputs a step; `share` programs a multiprocessor, each with a ring
    of `slots` steps.
    """
    block_m = max(8, min(128, 1 << (m - 1).bit_length()))
    if m <= 2:
        shapes = [(64, 128, 4, 1), (64, 256, 4, 1), (128, 64, 4, 1), (64, 128, 4, 2)]
    elif block_m <= 64:
        shapes = [(64, 128, 4, 1), (64, 128, 4, 2), (64, 256, 4, 1), (128, 64, 4, 1), (128, 128, 4, 1)]
        shapes += [(128, 64, 4, 2), (128, 128, 4, 2), (128, 128, 8, 1), (256, 64, 8, 1)]
        shapes += [(128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)]
    else:
        shapes = [(64, 128, 4, 1), (64, 64, 4, 1), (64, 64, 4, 2), (128, 64, 8, 1), (128, 128, 8, 1)]
    found = []
    for block_n, block_k, warps, share in shapes:
        slots = min(12, RING_BYTES // share // ((block_n + block_m) * block_k * 2))
        config = {
            "kernel": "columns",
            "block_n": block_n,
            "block_m": block_m,
            "block_k": block_k,
            "share": share,
            "slots": slots,
            "warps": warps,
        }
        if slots >= 2 and runs(config, m, n, k, device):
            found.append(config)
    return found


def run(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    """x [m, k] times weight [n, k] transposed, and bias; rows of weight must begin at whole 16 bytes."""
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
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
    descriptors = (
        TensorDescriptor.from_tensor(
            tensor, [rows, block_k], gl.NVMMASharedLayout.get_default_for([rows, block_k], TYPES[x.dtype])
        )
        for tensor, rows in ((x, block_m), (weight, block_n))
    )
    _columns[(programs,)](
        *descriptors,
        y if bias is None else bias,
        y,
        partials,
        arrivals,
        m,
        n,
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


@gluon.jit(do_not_specialize=["m", "n", "columns", "blocks", "steps"])
def _columns(
    x_desc,
    w_desc,
    bias_ptr,
    y_ptr,
    partials,
    arrivals,
    m,
    n,
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
    """A share of the steps of all tiles of y^T [BLOCK_N, BLOCK_M], the blocks of x over one column side by side."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    BYTES: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    dtype: gl.constexpr = x_desc.dtype
    program, programs = gl.program_id(0), gl.num_programs(0)
    all_steps = columns * blocks * steps
    start, end = program * all_steps // programs, (program + 1) * all_steps // programs

    w_ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, BLOCK_K], w_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, BLOCK_K], x_desc.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS + 1):
        mbarrier.init(barriers.index(slot), count=1)
    fence_async_shared()
    thread_barrier()
    # The step that is fetched next. W is asked for before the kernels that make x have ended.
    tokens, inputs = blocks * BLOCK_M, steps * BLOCK_K
    row, token = start // steps // blocks * BLOCK_N, start // steps % blocks * BLOCK_M
    inner = start % steps * BLOCK_K
    w_row, w_token, w_inner = row, token, inner
    for slot in range(gl.minimum(end - start, SLOTS)):
        mbarrier.expect(barriers.index(slot), BYTES)
        load_tile(w_desc, [w_row, w_inner], barriers.index(slot), w_ring.index(slot))
        w_row, w_token, w_inner = next_step(w_row, w_token, w_inner, tokens, inputs, BLOCK_N, BLOCK_M, BLOCK_K)
    # x's descriptor is fetched as well, by asking for a tile past all rows: zeros, for which nothing is read.
    mbarrier.expect(barriers.index(SLOTS), x_desc.block_type.nbytes)
    load_tile(x_desc, [tokens, 0], barriers.index(SLOTS), x_ring.index(0))
    if PDL:
        dependent_launch.depend()
    mbarrier.wait(barriers.index(SLOTS), 0)
    for slot in range(gl.minimum(end - start, SLOTS)):
        load_tile(x_desc, [token, inner], barriers.index(slot), x_ring.index(slot))
        row, token, inner = next_step(row, token, inner, tokens, inputs, BLOCK_N, BLOCK_M, BLOCK_K)

    spot, phase, freed = 0, 0, 0
    for tile in range(start // steps, (end - 1) // steps + 1):
        first, last = gl.maximum(start, tile * steps), gl.minimum(end, (tile + 1) * steps)
        total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
        for step in range(first, last):
            mbarrier.wait(barriers.index(spot), phase)
            total = warpgroup_mma(w_ring.index(spot), x_ring.index(spot).permute([1, 0]), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            # The product before this one has ended: when all warps have come here, its slot is free.
            thread_barrier()
            if (step > start) & (step + SLOTS - 1 < end):
                mbarrier.expect(barriers.index(freed), BYTES)
                load_tile(w_desc, [row, inner], barriers.index(freed), w_ring.index(freed))
                load_tile(x_desc, [token, inner], barriers.index(freed), x_ring.index(freed))
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
            y_row = tile // blocks * BLOCK_N + row_inside
            y_token = tile % blocks * BLOCK_M + token_inside
            if HAS_BIAS:
                total += gl.load(bias_ptr + y_row, mask=y_row < n, other=0.0).to(gl.float32)[:, None]
            mask = (y_row < n)[:, None] & (y_token < m)[None, :]
            gl.store(y_ptr + y_row[:, None] + (y_token.to(gl.int64) * n)[None, :], total.to(dtype), mask=mask)
