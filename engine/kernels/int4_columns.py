# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
# ruff: noqa: RUF005  (Gluon has no unpacking)
"""y = x W^T with 4-bit weights for 9 to 512 rows of x on sm_90, with x read from the L2 cache as seldom as can be.

y^T = W x^T by tiles of 64 to 256 rows of W, of which all warps multiply the same tile of x in shared memory: what x
costs in the L2 cache falls with the rows of W that share it, and it is what bounds a product of 64 rows and more. So
large tiles do not come out even on all multiprocessors: their steps are shared out (see `shared_steps`). Words and
scales of W go to shared memory as well, by the copy engine, where many of them are on their way at no register's cost;
from there they are the left operand of asynchronous matrix instructions after unpacking, half a tile ahead.
(Above 300 lines: one kernel, and what it needs is not used elsewhere.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from engine.kernels.int4_fragments import left_operand, silu, turns_apart
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.shared_steps import combine, doubles, next_step, thread_barrier
from engine.kernels.tuning import Config

FEWEST_ROWS, MOST_ROWS = 9, 512
# What the rings of all programs of a multiprocessor may take of its 227 KB of shared memory: the rest is for barriers,
# for turning y, and for the small kernels that start while this one ends.
RING_BYTES = 204_800
# A name that Triton changed after 3.6.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
# Of a tile of 64 rows and 128 inputs: int16 of its words in rows of 256, and a word of scale and zero a row.
WORD_ROWS, WORD_ROW, PAIRS = 8, 256, 64


def runs(m: int, dtype: torch.dtype, weights: Int4Weights, device: Device) -> bool:
    """Whether this kernel can do a product here; x's rows must begin at whole 16 bytes, as the copy engine reads."""
    return (
        FEWEST_ROWS <= m <= MOST_ROWS
        and device.capability[0] == 9
        and weights.group_size == 128
        and weights.in_features % 8 == 0
        and dtype in TYPES
        and -(-weights.out_features // 64) * -(-m // 16) <= splits.TILES
    )


def default_config(m: int, weights: Int4Weights, device: Device) -> dict[str, Any]:
    """block_n rows of W and block_m rows of x a tile; `turn` tiles of 128 inputs an iteration, at whose end all
    products are waited for; `share` programs a multiprocessor, each with a ring of `slots` tiles of x and of W."""
    return dict(candidates(m, weights.out_features, weights.in_features, device)[0])


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries."""
    if not FEWEST_ROWS <= m <= MOST_ROWS:
        return []
    block_m = max(16, min(128, 1 << (m - 1).bit_length()))
    # block_n, warps, turn, share: as many programs as the registers of a multiprocessor are enough for.
    if m > 64:
        shapes = [(256, 8, 2, 1), (256, 16, 2, 1), (128, 8, 2, 1), (128, 8, 4, 1), (128, 4, 2, 2)]
    else:
        shapes = [(256, 8, 4, 1), (256, 8, 2, 1), (256, 16, 4, 1), (128, 8, 4, 1), (128, 8, 2, 2), (128, 4, 2, 2)]
        shapes += [(128, 4, 2, 3), (64, 4, 4, 3)] if m <= 32 else [(64, 4, 4, 2)]
    found = []
    for block_n, warps, turn, share in shapes:
        slots = min(12, RING_BYTES // share // slot_bytes(block_n, block_m))
        if slots >= 2:
            found.append(
                {
                    "kernel": "columns",
                    "block_n": block_n,
                    "block_m": block_m,
                    "turn": turn,
                    "share": share,
                    "slots": slots,
                    "warps": warps,
                }
            )
    return found


def slot_bytes(block_n: int, block_m: int) -> int:
    """Shared memory of one slot: 128 inputs of block_m rows of x, and words, scales and zeros of block_n rows of W."""
    return block_m * 256 + block_n // 64 * (WORD_ROWS * WORD_ROW * 2 + PAIRS * 4)


def run(x: Tensor, weights: Int4Weights, bias: Tensor | None, config: Config, *, gated: bool = False) -> Tensor:
    """The product for x [M, in], M up to 512; `gated` as in `int4_linear`."""
    m, n = x.shape[0], weights.out_features
    rows, tiles = weights.words.shape[:2]
    width = n // 2 if gated else n
    y = torch.empty(m, width, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # the copy engine reads from whole 16 bytes
    block_n, block_m, turn = config["block_n"], config["block_m"], config["turn"]
    columns, blocks, turns = -(-n // block_n), -(-m // block_m), -(-tiles // turn)
    partials, arrivals = splits.buffers(x.device)
    programs = min(
        config["share"] * facts(x.device).multiprocessors,
        columns * blocks * turns,
        splits.PARTIAL_FLOATS // (2 * block_n * block_m),
    )
    x_layout = gl.NVMMASharedLayout.get_default_for([block_m, 128], TYPES[x.dtype])
    words = weights.words.view(torch.int16).view(rows, tiles * WORD_ROWS, WORD_ROW)
    _columns[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, 128], x_layout),
        TensorDescriptor.from_tensor(words, [block_n // 64, WORD_ROWS, WORD_ROW], gl.NVMMASharedLayout(0, 16, 3)),
        TensorDescriptor.from_tensor(
            weights.scale_zero.view(rows, tiles * PAIRS), [block_n // 64, PAIRS], gl.NVMMASharedLayout(0, 32, 2)
        ),
        y if bias is None else bias,
        y,
        partials,
        arrivals,
        m,
        n,
        width // 8,
        columns,
        blocks,
        turns,
        HAS_BIAS=bias is not None,
        GATED=gated,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        TURN=turn,
        SLOTS=config["slots"],
        num_warps=config["warps"],
        **dependent_launch.options(facts(x.device)),
    )
    return y


@gluon.constexpr_function
def _word_layout(block_n, warps):
    """Of [tile of rows, (a, w), (r, t, 8)] int16: 16 bytes a thread, a warp reading what lies together."""
    tiles, groups = block_n // 64, warps // 4
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 4, 0]] + doubles(groups, tiles, [], [0, 0])
    warp_bases = [[0, 1, 0], [0, 2, 0]] + doubles(1, groups, [], [0, 0])
    return gl.DistributedLinearLayout(registers, doubles(8, 256, [0, 0], []), warp_bases, [], [tiles, 8, 256])


@gluon.constexpr_function
def _pair_layout(block_n, warps):
    """Of [tile of rows, (w, r, half)]: a thread has its two rows; lanes that differ in t have the same."""
    tiles, groups = block_n // 64, warps // 4
    registers = [[0, 1]] + doubles(groups, tiles, [], [0])
    lanes = [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]]
    warp_bases = [[0, 16], [0, 32]] + doubles(1, groups, [], [0])
    return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [tiles, 64])


@gluon.constexpr_function
def _out_layout(block_m, columns, own, warps):
    """Of y [block_m, columns]: a warp keeps its `own` 8 or 16 columns of every tile, a thread 8 of them, 16 bytes."""
    tokens = doubles(1, block_m, [], [0])
    lanes = ([[0, 8]] if own == 16 else []) + tokens
    lanes, more = lanes[:5], lanes[5:]
    registers = [[0, 1], [0, 2], [0, 4]] + more + doubles(own * warps, columns, [0], [])
    lanes = lanes + [[0, 0]] * (5 - len(lanes))
    return gl.DistributedLinearLayout(registers, lanes, doubles(own, own * warps, [0], []), [], [block_m, columns])


@gluon.jit
def _take(words, pairs, BLOCK_N: gl.constexpr, A: gl.constexpr):
    """Of a slot the words of inputs 0 to 63 and of 64 to 127, each [BLOCK_N, 16] int16, and scales and zeros."""
    w = words.load(_word_layout(BLOCK_N, gl.num_warps()))
    # [tile of rows, a, w, r, t, half, h, e] -> [(tile of rows, w, half, r), (a, t, e), h]
    w = w.reshape([BLOCK_N // 64, 2, 4, 8, 4, 2, 2, 2]).permute([0, 2, 5, 3, 1, 4, 7, 6])
    first, second = w.reshape([BLOCK_N, 16, 2]).split()
    first, second = gl.convert_layout(first, A, assert_trivial=True), gl.convert_layout(second, A, assert_trivial=True)
    return first, second, pairs.load(_pair_layout(BLOCK_N, gl.num_warps()))


@gluon.jit(do_not_specialize=["m", "n", "eighths", "columns", "blocks", "turns"])
def _columns(
    x_desc,
    words_desc,
    pairs_desc,
    bias_ptr,
    y_ptr,
    partials,
    arrivals,
    m,
    n,
    eighths,
    columns,
    blocks,
    turns,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TURN: gl.constexpr,
    SLOTS: gl.constexpr,
    PDL: gl.constexpr,
):
    """A share of the turns of all tiles of y^T [BLOCK_N, BLOCK_M], the blocks of x over one column side by side.

    eighths: outputs of y a row, in eights.
    """
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ROWS: gl.constexpr = BLOCK_N // 64
    dtype: gl.constexpr = x_desc.dtype
    program, programs = gl.program_id(0), gl.num_programs(0)
    all_turns = columns * blocks * turns
    start, end = program * all_turns // programs, (program + 1) * all_turns // programs

    x_ring = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_M, 128], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int16, [SLOTS, ROWS, 8, 256], words_desc.layout)
    p_ring = gl.allocate_shared_memory(gl.int32, [SLOTS, ROWS, 64], pairs_desc.layout)
    # Barriers for each operand: the compiler parts copies that count on one array by a barrier of all warps.
    x_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    described = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(w_full.index(slot), count=1)
        mbarrier.init(p_full.index(slot), count=1)
    mbarrier.init(described, count=1)
    fence_async_shared()
    thread_barrier()
    # The tiles that are fetched next, in tiles of rows, rows of x and tiles of inputs. W is asked for before the
    # kernels that make x have ended.
    steps, tokens, inputs = (end - start) * TURN, blocks * BLOCK_M, turns * TURN
    row, token = start // turns // blocks * ROWS, start // turns % blocks * BLOCK_M
    inner = start % turns * TURN
    w_row, w_token, w_inner = row, token, inner
    for slot in range(gl.minimum(steps, SLOTS)):
        mbarrier.expect(w_full.index(slot), words_desc.block_type.nbytes)
        mbarrier.expect(p_full.index(slot), pairs_desc.block_type.nbytes)
        load_tile(words_desc, [w_row, w_inner * 8, 0], w_full.index(slot), w_ring.index(slot))
        load_tile(pairs_desc, [w_row, w_inner * 64], p_full.index(slot), p_ring.index(slot))
        w_row, w_token, w_inner = next_step(w_row, w_token, w_inner, tokens, inputs, ROWS, BLOCK_M, 1)
    # x's descriptor is fetched as well, by asking for a tile past all rows: zeros, for which nothing is read.
    mbarrier.expect(described, x_desc.block_type.nbytes)
    load_tile(x_desc, [tokens, 0], described, x_ring.index(0))
    if PDL:
        dependent_launch.depend()
    mbarrier.wait(described, 0)
    for slot in range(gl.minimum(steps, SLOTS)):
        mbarrier.expect(x_full.index(slot), x_desc.block_type.nbytes)
        load_tile(x_desc, [token, inner * 128], x_full.index(slot), x_ring.index(slot))
        row, token, inner = next_step(row, token, inner, tokens, inputs, ROWS, BLOCK_M, 1)

    # left: steps that no slot was asked for yet; freed: the slot before `spot`.
    spot, phase, freed, left = 0, 0, 0, steps - SLOTS
    for tile in range(start // turns, (end - 1) // turns + 1):
        first, last = gl.maximum(start, tile * turns), gl.minimum(end, (tile + 1) * turns)
        total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
        mbarrier.wait(w_full.index(spot), phase)
        mbarrier.wait(p_full.index(spot), phase)
        early, late, pairs = _take(w_ring.index(spot), p_ring.index(spot), BLOCK_N, A)
        half = left_operand(early, pairs, BLOCK_N, A, dtype)
        for turn in range(first, last):
            for step in gl.static_range(TURN):
                mbarrier.wait(x_full.index(spot), phase)
                x = x_ring.index(spot)
                total = warpgroup_mma(half, x.slice(0, 64, 1).permute([1, 0]), total, is_async=True)
                total = warpgroup_mma_wait(1, deps=[total])
                second = left_operand(late, pairs, BLOCK_N, A, dtype)
                total = warpgroup_mma(second, x.slice(64, 64, 1).permute([1, 0]), total, is_async=True)
                # All products of the step before have ended: when all warps have come here, its slot is free. It is
                # asked for behind the second half, so that no warp waits for others between two products.
                thread_barrier()
                ask = ((step > 0) | (turn > start)) & (left > 0)
                mbarrier.expect(x_full.index(freed), x_desc.block_type.nbytes, pred=ask)
                mbarrier.expect(w_full.index(freed), words_desc.block_type.nbytes, pred=ask)
                mbarrier.expect(p_full.index(freed), pairs_desc.block_type.nbytes, pred=ask)
                load_tile(x_desc, [token, inner * 128], x_full.index(freed), x_ring.index(freed), pred=ask)
                load_tile(words_desc, [row, inner * 8, 0], w_full.index(freed), w_ring.index(freed), pred=ask)
                load_tile(pairs_desc, [row, inner * 64], p_full.index(freed), p_ring.index(freed), pred=ask)
                if ask:
                    row, token, inner = next_step(row, token, inner, tokens, inputs, ROWS, BLOCK_M, 1)
                    left -= 1
                freed = spot
                spot = gl.where(freed == SLOTS - 1, 0, freed + 1)
                phase = gl.where(freed == SLOTS - 1, phase ^ 1, phase)
                # The first half of the next step is unpacked while the second of this one is multiplied; behind the
                # last step of a tile it is not used.
                more = (step + 1 < TURN) | (turn + 1 < last)
                mbarrier.wait(w_full.index(spot), phase, pred=more)
                mbarrier.wait(p_full.index(spot), phase, pred=more)
                early, late, pairs = _take(w_ring.index(spot), p_ring.index(spot), BLOCK_N, A)
                total = warpgroup_mma_wait(1, deps=[total])
                half = left_operand(early, pairs, BLOCK_N, A, dtype)
            # A product that is on its way from one turn to the next would make the compiler wait for each.
            total = warpgroup_mma_wait(0, deps=[total])

        row_inside = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
        token_inside = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
        place = (row_inside * BLOCK_M)[:, None] + token_inside[None, :]
        total, complete = combine(
            total, place, partials, arrivals, tile, turns, first, last, all_turns, BLOCK_N * BLOCK_M
        )
        if complete:
            column, block = tile // blocks, tile % blocks
            if HAS_BIAS:
                y_row = column * BLOCK_N + row_inside
                total += gl.load(bias_ptr + y_row, mask=y_row < n, other=0.0).to(gl.float32)[:, None]
            OWN: gl.constexpr = 8 if GATED else 16
            COLUMNS: gl.constexpr = BLOCK_N // 16 * OWN
            if GATED:
                gate, up = turns_apart(total, BLOCK_N // 16, BLOCK_M)
                result = silu(gate) * up
            else:
                result = total
            OUT: gl.constexpr = _out_layout(BLOCK_M, COLUMNS, OWN, WARPS)
            y = gl.convert_layout(result.to(dtype).permute([1, 0]), OUT)
            y_token = block * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
            output = column * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT))
            mask = (y_token < m)[:, None] & (output < eighths * 8)[None, :]
            gl.store(y_ptr + y_token.to(gl.int64)[:, None] * (eighths * 8) + output[None, :], y, mask=mask)
