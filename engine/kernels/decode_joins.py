# ruff: noqa: RET505  (a branch of constants: the other is not compiled only if it is an else)
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,misc,assignment"
"""How parts of attention join, in Gluon: those of a program's warps, and those of programs.

A warp's part is a sum [DIMS, 8] of values times weights (eight query heads), the weights' sum [8], and the power of two
that both are relative to. A program's is that sum divided by the weights', and log2 of the latter. The last program of
a head to arrive joins all of them in their order, so that the result does not depend on which one it was.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.kernels.load_order import barrier

# How many parts are on their way at once when those of programs are joined.
AT_ONCE = gl.constexpr(8)


@gluon.jit
def of_warps(o, weight, best, warp, DIMS: gl.constexpr, WARPS: gl.constexpr, OUT: gl.constexpr):
    """What all warps have, joined: sums [DIMS, 8], weights [8] and what both are relative to [8]."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, OUT)
    if WARPS == 1:
        o = gl.convert_layout(o, OUT, assert_trivial=True)
        return o, gl.convert_layout(weight, COLUMNS), gl.convert_layout(best, COLUMNS)
    else:
        LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        all_o = gl.allocate_shared_memory(gl.float32, [WARPS, DIMS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
        all_weight = gl.allocate_shared_memory(gl.float32, [WARPS, 8], LINE)
        all_best = gl.allocate_shared_memory(gl.float32, [WARPS, 8], LINE)
        all_o.index(warp).store(o)
        all_weight.index(warp).store(weight)
        all_best.index(warp).store(best)
        barrier()
        highest = all_best.index(0).load(COLUMNS)
        for other in gl.static_range(1, WARPS):
            highest = gl.maximum(highest, all_best.index(other).load(COLUMNS))
        total = gl.zeros([DIMS, 8], gl.float32, OUT)
        weights = gl.zeros([8], gl.float32, COLUMNS)
        for other in gl.static_range(WARPS):
            keep = gl.exp2(all_best.index(other).load(COLUMNS) - highest)
            weights += all_weight.index(other).load(COLUMNS) * keep
            total += all_o.index(other).load(OUT) * keep[None, :]
        return total, weights, highest


@gluon.jit
def of_splits(o, logs, partial, sums, arrivals, tile, row, split, here, dim, DIMS: gl.constexpr, SPLITS: gl.constexpr):
    """(all parts of a context joined, true) in the last program of a head to arrive, else (this part, false)."""
    first = row * SPLITS
    gl.store(partial + ((first + split) * DIMS)[None, :] + dim[:, None], o, mask=here[None, :])
    gl.store(sums + first + split, logs, mask=here)
    barrier()  # every thread's values are written before one thread counts the program in
    last = gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        highest = gl.load(sums + first, mask=here, other=float("-inf"), cache_modifier=".cg")
        for other in gl.static_range(1, SPLITS):
            one = gl.load(sums + first + other, mask=here, other=float("-inf"), cache_modifier=".cg")
            highest = gl.maximum(highest, one)
        shift = gl.where(highest == float("-inf"), 0.0, highest)
        o = gl.zeros_like(o)
        whole = gl.zeros_like(logs)
        STEP: gl.constexpr = min(SPLITS, AT_ONCE)
        for start in range(0, SPLITS, STEP):
            for each in gl.static_range(STEP):
                there = here & (start + each < SPLITS)
                one = gl.load(sums + first + start + each, mask=there, other=float("-inf"), cache_modifier=".cg")
                weight = gl.exp2(one - shift)
                at = ((first + start + each) * DIMS)[None, :] + dim[:, None]
                o += weight[None, :] * gl.load(partial + at, mask=there[None, :], other=0.0, cache_modifier=".cg")
                whole += weight
        o = o / gl.where(whole > 0, whole, 1.0)[None, :]
        gl.store(arrivals + tile, 0)
    return o, last


@gluon.constexpr_function
def _power_of_two(number):
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


@gluon.jit
def of_parts(out, partial, sums, arrivals, row, count, DIMS: gl.constexpr, PARTS: gl.constexpr):
    """Counts in a program of one warp that has stored its part [DIMS] of head `row`, and the logarithm of its weights.
    The last of `count` (at most PARTS) to arrive stores them all, joined, in `out` [DIMS]."""
    barrier()  # every lane's values are written before one of them counts the program in
    if gl.atomic_add(arrivals + row, 1, sem="acq_rel") == count - 1:
        # All loads are on their way before the first is used, and no lane exchanges anything.
        MOST: gl.constexpr = _power_of_two(PARTS)
        PLACES: gl.constexpr = gl.BlockedLayout([MOST, DIMS // 32], [1, 32], [1, 1], [1, 0])
        part = gl.arange(0, MOST, layout=gl.SliceLayout(1, PLACES))
        dim = gl.arange(0, DIMS, layout=gl.SliceLayout(0, PLACES))
        there = part < count
        first = row * PARTS
        logs = gl.load(sums + first + part, mask=there, other=float("-inf"), cache_modifier=".cg")
        parts = gl.load(
            partial + first * DIMS + (part * DIMS)[:, None] + dim[None, :],
            mask=there[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        weight = gl.exp2(logs - gl.max(logs, 0))
        joined = gl.sum(parts * weight[:, None], 0) / gl.sum(weight, 0)
        gl.store(out + dim, joined.to(out.dtype.element_ty))
        gl.store(arrivals + row, 0)
