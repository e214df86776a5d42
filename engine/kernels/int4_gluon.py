# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
# ruff: noqa: RUF005  (Gluon has no unpacking)
"""y = x W^T with 4-bit weights on sm_90: W goes from memory to registers, x by the copy engine to shared memory.

y^T = W x^T: W is the left operand of asynchronous matrix instructions, in registers, so no lane exchanges anything and
no barrier waits for weights. The words of the next `ahead` tiles are in registers already while a tile is multiplied;
half a tile is unpacked while the half before it is multiplied. x lies in a ring of tiles of [block_m, 128], of which
`wait` arrive together and `slot` are given back together, once the products that read them are done.
Weights are multiplied by their scales, or sums are ("scaled": "sums" in a configuration): the products of a tile, of
which every row has one scale, are added up apart and times that scale to the total, while the next tile is multiplied.
(Above 300 lines: one kernel, and what it needs is not used elsewhere.)
"""

from __future__ import annotations

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

from engine.kernels import dependent_launch, split_tiles, splits
from engine.kernels.device import Device, facts
from engine.kernels.int4_fragments import (
    PAIRS,
    WORDS,
    halves,
    left_operand,
    pair_places,
    rows_of,
    scales,
    silu,
    turns_apart,
    word_places,
)
from engine.kernels.int4_gluon_configs import MOST_ROWS
from engine.kernels.int4_gluon_configs import candidates as candidates
from engine.kernels.int4_gluon_configs import default_config as default_config
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.load_order import in_order
from engine.kernels.tuning import Config

# Two names that Triton changed after 3.6.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def runs(m: int, dtype: torch.dtype, weights: Int4Weights, device: Device) -> bool:
    """Whether this kernel can do a product here."""
    return (
        1 <= m <= MOST_ROWS
        and device.capability[0] == 9
        and weights.group_size == 128
        and weights.in_features % 8 == 0
        and dtype in TYPES
    )


def run(x: Tensor, weights: Int4Weights, bias: Tensor | None, config: Config, *, gated: bool = False) -> Tensor:
    """The product for x [M, in], M up to MOST_ROWS; `gated` as in `int4_linear`."""
    m, n, tiles = x.shape[0], weights.out_features, weights.words.shape[1]
    y = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()  # the copy engine reads from whole 16 bytes
    block_m, block_n, turn = config["block_m"], config["block_n"], config["turn"]
    grid_n, grid_m = -(-n // block_n), -(-m // block_m)
    all_turns = -(-tiles // turn)
    grid: tuple[int, ...]
    if "places" in config:
        sizes = grid_n * grid_m, config["places"], config["splits"], all_turns, block_n * block_m
        programs, whole, parts, lead, longest = split_tiles.plan(*sizes)
        grid = (programs,)
    else:
        parts = splits.fitting(config["splits"], grid_n * grid_m, block_n * block_m, all_turns)
        grid, whole, lead, longest = (grid_n, grid_m, parts), 0, 0, -(-all_turns // parts)
    partials, arrivals = splits.buffers(x.device)
    box = [block_m, 128 * config["wait"]]
    layout = gl.NVMMASharedLayout.get_default_for(box, TYPES[x.dtype])
    _gemm[grid](
        TensorDescriptor.from_tensor(x, box, layout),
        weights.words,
        weights.scale_zero,
        y if bias is None else bias,
        y,
        partials,
        arrivals,
        m,
        n,
        y.shape[1] // 8,
        tiles,
        -(-n // 64),
        whole,
        lead,
        parts,
        HAS_BIAS=bias is not None,
        GATED=gated,
        RAGGED=-(-n // 64) % (block_n // 64) != 0,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        TURN=turn,
        AHEAD=config["ahead"],
        RING=config["ring"] // config["wait"],
        SLOT=config["slot"],
        WAIT=config["wait"],
        SPLITS=1 if "places" in config else parts,
        TAIL="places" in config,
        FITS=longest * turn <= config["ring"],
        SUMS=config.get("scaled") == "sums",
        num_warps=config["warps"],
        **dependent_launch.options(facts(x.device)),
    )
    return y


@gluon.jit
def _fetch(x_desc, first_token, tile, barrier, place):
    mbarrier.expect(barrier, x_desc.block_type.nbytes)
    load_tile(x_desc, [first_token, tile * 128], barrier, place)


@gluon.jit
def _refill(
    x_desc,
    first_token,
    start,
    used,
    pieces,
    barriers,
    ring,
    RING: gl.constexpr,
    SLOT: gl.constexpr,
    WAIT: gl.constexpr,
):
    """Asks for what follows in the places of the last SLOT tiles before piece `used`, of `pieces` in all."""
    thread_barrier()
    for back in gl.static_range(SLOT // WAIT):
        piece = used - SLOT // WAIT + back + RING
        if piece < pieces:
            _fetch(x_desc, first_token, start + piece * WAIT, barriers.index(piece % RING), ring.index(piece % RING))


@gluon.jit(do_not_specialize=["m", "n", "eighths", "tiles", "tile_rows", "whole", "lead", "parts"])
def _gemm(
    x_desc,
    words_ptr,
    scale_zero_ptr,
    bias_ptr,
    y_ptr,
    partials,
    arrivals,
    m,
    n,
    eighths,
    tiles,
    tile_rows,
    whole,
    lead,
    parts,
    HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
    RAGGED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TURN: gl.constexpr,
    AHEAD: gl.constexpr,
    RING: gl.constexpr,
    SLOT: gl.constexpr,
    WAIT: gl.constexpr,
    SPLITS: gl.constexpr,
    TAIL: gl.constexpr,
    FITS: gl.constexpr,
    SUMS: gl.constexpr,
    PDL: gl.constexpr,
):
    """One tile of y^T [BLOCK_N, BLOCK_M], or a part of its sum.

    eighths: outputs of y a row, in eights. RAGGED: the last program has fewer tiles of rows than the others. RING
    pieces of WAIT tiles of x are in shared memory. FITS: they are all that a program reads, so nothing is refilled.
    """
    gl.static_assert(FITS or SLOT == TURN or RING * WAIT > SLOT, "a tile would wait for the place of its own slot")
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    dtype: gl.constexpr = x_desc.dtype
    # The parts of a sum are whole turns: only the last part may reach past the inputs, where x is zero.
    if TAIL:
        all_turns = (tiles + TURN - 1) // TURN
        place, shared, split, begin, end = split_tiles.place(whole, lead, parts, all_turns)
        blocks = (m + BLOCK_M - 1) // BLOCK_M
        column, block = place // blocks, place % blocks  # programs of the same weights are neighbours
        start, turns = begin * TURN, end - begin
    else:
        column, block, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
        all_turns = (tiles + TURN - 1) // TURN
        start = split * all_turns // SPLITS * TURN
        turns = (split + 1) * all_turns // SPLITS - start // TURN
    first_tile, first_token = column * (BLOCK_N // 64), block * BLOCK_M

    # What would lie past the inputs is zeros, as x is there.
    remaining = gl.minimum(turns * TURN, tiles - start)
    word_at = word_places(words_ptr, first_tile, start, tiles, tile_rows, RAGGED, BLOCK_N)
    pair_at = pair_places(scale_zero_ptr, first_tile, start, tiles, tile_rows, RAGGED, BLOCK_N)
    words, pairs = (), ()
    for step in gl.static_range(AHEAD):
        words = words + (gl.load(word_at + step * WORDS, mask=step < remaining, other=0),)
        pairs = pairs + (gl.load(pair_at + step * PAIRS, mask=step < remaining, other=0),)
    ring = gl.allocate_shared_memory(dtype, [RING, BLOCK_M, 128 * WAIT], x_desc.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for piece in gl.static_range(RING):
        mbarrier.init(barriers.index(piece), count=1)
    fence_async_shared()
    thread_barrier()
    if PDL:
        dependent_launch.depend()
    for piece in gl.static_range(RING):
        if piece * WAIT < turns * TURN:
            _fetch(x_desc, first_token, start + piece * WAIT, barriers.index(piece), ring.index(piece))

    total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    left = left_operand(halves(words[0], BLOCK_N, MMA)[0], pairs[0], BLOCK_N, MMA, dtype, not SUMS)
    for turn in range(turns):
        sums = total
        scale = gl.expand_dims(scales(rows_of(pairs[0], BLOCK_N, MMA)), 1)
        for step in gl.static_range(TURN):
            used = turn * (TURN // WAIT) + step // WAIT
            held = used % RING
            if RING > TURN // WAIT and RING % (TURN // WAIT) == 0:  # addresses that differ by a constant
                held = turn % (RING // (TURN // WAIT)) * (TURN // WAIT) + step // WAIT
            if step % WAIT == 0:
                mbarrier.wait(barriers.index(held), used // RING & 1)
            x = ring.index(held)
            right = x.slice(step % WAIT * 128, 64, 1).permute([1, 0])
            if SUMS:
                before, sums = sums, warpgroup_mma(left, right, total, use_acc=False, is_async=True)
                sums, before = warpgroup_mma_wait(1, deps=[sums, before])
                if step > 0:
                    total += before * scale
                scale = gl.expand_dims(scales(rows_of(pairs[0], BLOCK_N, MMA)), 1)
            else:
                sums = warpgroup_mma(left, right, sums, is_async=True)
                sums = warpgroup_mma_wait(1, deps=[sums])
            # All products of the tile before are done now.
            if not FITS and step % SLOT == 0 and step > 0:
                _refill(x_desc, first_token, start, used, turns * (TURN // WAIT), barriers, ring, RING, SLOT, WAIT)
            second = left_operand(halves(words[0], BLOCK_N, MMA)[1], pairs[0], BLOCK_N, MMA, dtype, not SUMS)
            right = x.slice(step % WAIT * 128 + 64, 64, 1).permute([1, 0])
            sums = warpgroup_mma(second, right, sums, is_async=True)
            more = step + AHEAD < remaining
            words = words[1:] + (gl.load(word_at + (step + AHEAD) * WORDS, mask=more, other=0),)
            pairs = pairs[1:] + (gl.load(pair_at + (step + AHEAD) * PAIRS, mask=more, other=0),)
            if WAIT > 1:  # else the wait for the next tile's x is near, which no load passes
                in_order(WARPS)
            # The first half of the next tile is unpacked while the second of this one is multiplied.
            sums = warpgroup_mma_wait(1, deps=[sums])
            left = left_operand(halves(words[0], BLOCK_N, MMA)[0], pairs[0], BLOCK_N, MMA, dtype, not SUMS)
        # A product that is on its way from one turn to the next would make the compiler wait for each.
        sums = warpgroup_mma_wait(0, deps=[sums])
        if SUMS:
            total += sums * scale
        else:
            total = sums
        word_at += TURN * WORDS
        pair_at += TURN * PAIRS
        remaining -= TURN
        if not FITS:
            used = (turn + 1) * (TURN // WAIT)
            _refill(x_desc, first_token, start, used, turns * (TURN // WAIT), barriers, ring, RING, SLOT, WAIT)

    row = column * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    last = True
    if TAIL:
        last = place < whole
        if shared:
            total, last = split_tiles.join(
                total, partials, arrivals, place - whole, split, parts, BLOCK_N, BLOCK_M, MMA
            )
    elif SPLITS > 1:
        tile = block * gl.num_programs(0) + column
        across = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))[None, :]
        inner = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))[:, None] * BLOCK_M + across
        parts = partials + tile.to(gl.int64) * (SPLITS * BLOCK_N * BLOCK_M) + inner
        gl.store(parts + split * (BLOCK_N * BLOCK_M), total)
        thread_barrier()  # every thread's part is written before one thread counts the program in
        last = gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = gl.load(parts, cache_modifier=".cg")
            for other in gl.static_range(1, SPLITS):
                total += gl.load(parts + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            gl.store(arrivals + tile, 0)
    if last:
        if HAS_BIAS:
            total += gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32)[:, None]
        COLUMNS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
        if GATED:
            gate, up = turns_apart(total, BLOCK_N // 16, BLOCK_M)
            result = silu(gate) * up
        else:
            result = total
        ACROSS: gl.constexpr = COLUMNS // 8
        OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
        y = result.to(dtype).permute([1, 0])
        if TAIL:
            # All at once where x was: a conversion would go through little memory in many steps.
            thread_barrier()
            PLACE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, COLUMNS], dtype)
            y = gl.allocate_shared_memory(dtype, [BLOCK_M, COLUMNS], PLACE, y).load(OUT)
        else:
            y = gl.convert_layout(y, OUT)
        token = first_token + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
        out_row = column * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT))
        width = eighths * 8  # a multiple that the compiler knows: 16 bytes are stored at once
        mask = (token < m)[:, None] & (out_row < width)[None, :]
        gl.store(y_ptr + token.to(gl.int64)[:, None] * width + out_row[None, :], y, mask=mask)
