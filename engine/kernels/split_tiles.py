# ruff: noqa: RET505, RUF005  (a branch of constants: the other is not compiled only if it is an else; no unpacking)
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
"""Products of which only the last tiles are split along the inputs, in Gluon.

As many tiles as go round the card a whole number of times are whole and come first; the tiles after them are split, so
that all multiprocessors end together (data-parallel with a Stream-K tail, Osama et al. 2023). The first part of a tile
is the longest: where a tile is more than a place's share, the other parts of several tiles follow in one place.
"""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels import splits
from engine.kernels.int4_fragments import bases

# A name that Triton changed after 3.6.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


class Plan(NamedTuple):
    """Programs of a launch: `whole` tiles, then the first parts of the others, then their second parts and so on.

    lead: turns of a first part; longest: turns of the longest program.
    """

    programs: int
    whole: int
    parts: int
    lead: int
    longest: int


def plan(tiles: int, places: int, parts: int, turns: int, tile_floats: int) -> Plan:
    """How `tiles` of `turns` each go to `places`, those of the last round in at most `parts` parts."""
    whole = tiles // places * places
    rest = tiles - whole
    parts = splits.fitting(parts, rest, tile_floats, turns) if rest else 1
    if parts == 1:
        return Plan(tiles, tiles, 1, turns, turns)
    share = max(-(-turns // parts), -(-turns * rest // places))
    lead = min(share, turns - parts + 1)
    return Plan(whole + rest * parts, whole, parts, lead, turns if whole else lead)


def likely_parts(tiles: int, places: int, turns: int) -> list[int]:
    """The two numbers of parts by which the last place ends first, counting half a turn for a program's start."""
    if tiles % places == 0 or turns < 2:
        return []

    def end(parts: int) -> float:
        split = plan(tiles, places, parts, turns, 1)
        rest, ends = tiles - split.whole, [0.0] * places
        starts = [split.lead + part * (turns - split.lead) // (split.parts - 1) for part in range(split.parts)]
        later = [after - before for before, after in itertools.pairwise(starts)]
        for length in (*[turns] * split.whole, *[split.lead] * rest, *(size for size in later for _ in range(rest))):
            heapq.heapreplace(ends, ends[0] + length + 0.5)
        return max(ends)

    return sorted(range(2, min(turns, 8) + 1), key=lambda parts: (end(parts), parts))[:2]


@gluon.jit
def place(whole, lead, parts, turns):
    """(tile, whether it is split, the program's part, its first turn, the turn after its last) of this program."""
    program = gl.program_id(0)
    shared = program >= whole
    after = gl.maximum(program - whole, 0)
    rest = gl.maximum((gl.num_programs(0) - whole) // parts, 1)
    tile = gl.where(shared, whole + after % rest, program)
    part = after // rest
    others = gl.maximum(parts - 1, 1)
    begin = gl.where(part > 0, lead + (part - 1) * (turns - lead) // others, 0)
    end = gl.where(shared, lead + part * (turns - lead) // others, turns)
    return tile, shared, part, begin, end


@gluon.constexpr_function
def _flat_layout(floats, warps):
    """Of [floats / 4, 4]: 16 bytes a thread, a warp's side by side."""
    registers = [[0, 1], [0, 2], *bases(32 * warps, floats // 4)]
    return gl.DistributedLinearLayout(registers, bases(1, 32), bases(32, 32 * warps), [], [floats // 4, 4])


@gluon.jit
def _pieces(flat, COUNT: gl.constexpr):
    """COUNT pieces of [rows, 4], in order; no data moves."""
    if COUNT == 1:
        return (gl.convert_layout(flat, _flat_layout(flat.shape[0] * 4, gl.num_warps()), assert_trivial=True),)
    else:
        first, last = flat.reshape([2, flat.shape[0] // 2, 4]).permute([1, 2, 0]).split()
        return _pieces(first, COUNT // 2) + _pieces(last, COUNT // 2)


@gluon.jit
def _together(pieces, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """What `_pieces` was given, of COUNT pieces from FIRST on."""
    if COUNT == 1:
        return pieces[FIRST]
    else:
        first, last = _together(pieces, FIRST, COUNT // 2), _together(pieces, FIRST + COUNT // 2, COUNT // 2)
        return gl.join(first, last).permute([2, 0, 1]).reshape([first.shape[0] * 2, 4])


@gluon.jit
def _places(pointer, ROWS: gl.constexpr):
    LAYOUT: gl.constexpr = _flat_layout(ROWS * 4, gl.num_warps())
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)) * 4
    return pointer + (rows[:, None] + gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT))[None, :])


@gluon.jit
def _store(pieces, pointer, COUNT: gl.constexpr, ROWS: gl.constexpr):
    places = _places(pointer, ROWS)
    for piece in gl.static_range(COUNT):
        gl.store(places + piece * (ROWS * 4), pieces[piece])


@gluon.jit
def _add(pieces, pointer, ADDS, COUNT: gl.constexpr, ROWS: gl.constexpr):
    """Piece by piece, so that not all that is read needs registers at once."""
    places, sums = _places(pointer, ROWS), ()
    for piece in gl.static_range(COUNT):
        read = gl.load(places + piece * (ROWS * 4), cache_modifier=".cg")
        sums = sums + (pieces[piece] + read if ADDS else read,)
    return sums


@gluon.jit
def join(
    total,
    partials,
    arrivals,
    tile,
    part,
    parts,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    MMA: gl.constexpr,
):
    """(sum of all parts, true) in the last program of a tile to arrive, else (anything, false).

    total: float32 [BLOCK_N, BLOCK_M] as an asynchronous matrix instruction leaves it. partials: `parts` times as many
    floats a tile; arrivals: a count a tile, 0 before and after. The parts are added in their order, whoever is last.
    """
    SIZE: gl.constexpr = BLOCK_N * BLOCK_M
    COUNT: gl.constexpr = SIZE // gl.num_warps() // 1024 if gl.num_warps() * 1024 < SIZE else 1
    ROWS: gl.constexpr = SIZE // 4 // COUNT
    # [tile of rows, half, r, block of columns, t, e]: a thread has half and e of a place.
    flat = total.reshape([BLOCK_N // 16, 2, 8, BLOCK_M // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([SIZE // 4, 4])
    pieces = _pieces(flat, COUNT)
    first = partials + tile.to(gl.int64) * (parts * SIZE)
    # Who finds all others there need not store its part.
    complete = gl.atomic_add(arrivals + tile, 0, sem="acquire") == parts - 1
    if not complete:
        _store(pieces, first + part * SIZE, COUNT, ROWS)
        thread_barrier()  # every thread's part is written before one thread counts the program in
        complete = gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == parts - 1
    if complete:
        if part > 1:
            # The sum of those before comes first; two sums at a time would be too many registers.
            _store(pieces, first + part * SIZE, COUNT, ROWS)
            pieces = _add(pieces, first, False, COUNT, ROWS)
            for other in range(1, part + 1):
                pieces = _add(pieces, first + other * SIZE, True, COUNT, ROWS)
        if part == 1:
            pieces = _add(pieces, first, True, COUNT, ROWS)
        for other in range(part + 1, parts):
            pieces = _add(pieces, first + other * SIZE, True, COUNT, ROWS)
        gl.store(arrivals + tile, 0)
    flat = _together(pieces, 0, COUNT).reshape([BLOCK_M // 8, BLOCK_N // 16, 8, 4, 2, 2])
    total = flat.permute([1, 4, 2, 0, 3, 5]).reshape([BLOCK_N, BLOCK_M])
    return gl.convert_layout(total, MMA, assert_trivial=True), complete
