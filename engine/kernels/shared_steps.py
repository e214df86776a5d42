# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Stream-K in Gluon: the steps of all tiles of a product are one row, of which every program takes an equal share.

The ring of a program never runs empty between two tiles, and no multiprocessor has more to do than another (Osama et
al. 2023). A tile that several programs share is summed in the order of the programs by the last of them to arrive, so
the same inputs give the same bits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A name that Triton changed after 3.6.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def next_step(row, token, inner, tokens, inputs, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr):
    """Where the tiles of the step after this one begin: along the inputs, then x's blocks, then W's rows."""
    inner = inner + BLOCK_K
    token = gl.where(inner >= inputs, token + BLOCK_M, token)
    inner = gl.where(inner >= inputs, 0, inner)
    row = gl.where(token >= tokens, row + BLOCK_N, row)
    token = gl.where(token >= tokens, 0, token)
    return row, token, inner


@gluon.jit
def combine(
    total,
    place,
    partials,
    arrivals,
    tile,
    steps,
    first,
    last,
    all_steps,
    SIZE: gl.constexpr,
):
    """(sum of all parts, true) in the last program of a tile to arrive, else (its part, false).

    total: the sum over steps `first` to `last` of all, of a tile that has `steps`; place: where in SIZE floats each of
    its elements lies. partials: two parts a program. arrivals: a count a tile, 0 before and after.
    """
    program, programs = gl.program_id(0), gl.num_programs(0)
    begin = tile * steps
    complete = last - first == steps
    if last - first < steps:
        # A program shares its first tile with those before it (place 0), its last with those after it (place 1).
        own = partials + (program * 2 + (first == begin).to(gl.int32)) * SIZE + place
        # The programs of a tile: step s is of the first one whose share ends after it.
        lowest = ((begin + 1) * programs - 1) // all_steps
        highest = ((begin + steps) * programs - 1) // all_steps
        # Who finds all others there need not store its part; most that end a share do.
        complete = gl.atomic_add(arrivals + tile, 0, sem="acquire") == highest - lowest
        if not complete:
            gl.store(own, total)
            thread_barrier()  # every thread's part is written before one thread counts the program in
            complete = gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == highest - lowest
        if complete:
            others = partials + place
            if program == lowest + 1:
                total += gl.load(others + (lowest * 2 + 1) * SIZE, cache_modifier=".cg")
            if program > lowest + 1:
                # The sum of those before comes first; two sums at a time would be too many registers.
                gl.store(own, total)
                total = gl.load(others + (lowest * 2 + 1) * SIZE, cache_modifier=".cg")
                for other in range(lowest + 1, program + 1):
                    total += gl.load(others + other * (2 * SIZE), cache_modifier=".cg")
            for other in range(program + 1, highest + 1):
                total += gl.load(others + other * (2 * SIZE), cache_modifier=".cg")
            gl.store(arrivals + tile, 0)
    return total, complete
