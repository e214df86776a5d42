# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""How the walking forms of decode attention share the blocks of all contexts, and join heads that were cut."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.page_rows import ask_for_rows, places


@triton.jit
def span(length, window: tl.constexpr, block: tl.constexpr, turns: tl.constexpr):
    """Of a sequence: oldest token that is seen, first (a multiple of block) and end of the tokens in pages, and their
    blocks, at least one. With `turns` the newest token does not come from the pages."""
    oldest = length * 0
    if window:
        oldest = tl.maximum(length - window, 0)
    base = oldest // block * block
    stop = length
    if turns:
        stop = tl.maximum(length - 1, 0)
    return oldest, base, stop, tl.maximum(tl.cdiv(stop - base, block), 1)


@triton.jit
def share_of(
    program,
    context_lens,
    batch,
    kv_heads: tl.constexpr,
    window: tl.constexpr,
    most: tl.constexpr,
    block: tl.constexpr,
    turns: tl.constexpr,
):
    """Blocks of every program but the last ones; first and end of this one's, counted through all sequences, their KV
    heads and the blocks of each; and of the first block its sequence, KV head and number. `most` holds `batch`."""
    index = tl.arange(0, most)
    lens = tl.load(context_lens + index, mask=index < batch, other=0)
    _, _, _, counts = span(lens, window, block, turns)
    counts = tl.where(index < batch, counts * kv_heads, 0)
    upto = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    share = tl.cdiv(total, tl.num_programs(0))
    begin = tl.minimum(program * share, total)
    end = tl.minimum(begin + share, total)
    sequence = tl.minimum(tl.sum((upto <= begin).to(tl.int32), 0), batch - 1)
    rest = begin - tl.max(tl.where(upto <= begin, upto, 0), 0)
    _, _, _, count = span(tl.load(context_lens + sequence), window, block, turns)
    return share, begin, end, sequence, rest // count, rest % count


@triton.jit
def ask(
    key,
    value,
    table,
    first,
    stop,
    head,
    kv_heads: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
):
    """Asks for the block of tokens from `first` on: what earlier steps wrote need not wait for the kernel before."""
    if first < stop:
        token = tl.minimum(first + tl.arange(0, block), stop - 1)
        place = places(table, first, token, head, kv_heads, page_len, block)
        ask_for_rows(key, place, head_dim)
        ask_for_rows(value, place, head_dim)


@triton.jit
def keep_part(
    partial, sums, program, first, o, log, at, log_at, mask, log_mask, size: tl.constexpr, group: tl.constexpr
):
    """Stores a part o of a head (offsets `at`, `size` in all) and the logarithms of its weights (`log_at`, `group`).

    A program has at most two parts: of a head that began in program `first` before it, and of one that begins in it.
    """
    place = program * 2 + (program == first).to(tl.int32)
    tl.store(partial + place * size + at, o, mask=mask)
    tl.store(sums + place * group + log_at, log, mask=log_mask)


@triton.jit
def join(results, tile, first, last, at, log_at, mask, log_mask, size: tl.constexpr, group: tl.constexpr):
    """Counts this program in for a head whose blocks the programs `first` to `last` share; the last to arrive joins
    their parts, from first to last."""
    out, partial, sums, arrivals = results
    if first < last:  # noqa: SIM102 - there is no short cut
        if tl.atomic_add(arrivals + first, 1, sem="acq_rel") == last - first:
            logs = sums + log_at
            highest = tl.load(logs + (first * 2 + 1) * group, mask=log_mask, other=float("-inf"), cache_modifier=".cg")
            for other in range(first + 1, last + 1):
                log = tl.load(logs + other * 2 * group, mask=log_mask, other=float("-inf"), cache_modifier=".cg")
                highest = tl.maximum(highest, log)
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.zeros(highest.shape, tl.float32)
            whole = tl.zeros(at.shape, tl.float32)
            for other in range(first, last + 1):
                place = other * 2 + (other == first).to(tl.int32)
                log = tl.load(logs + place * group, mask=log_mask, other=float("-inf"), cache_modifier=".cg")
                part = tl.load(partial + place * size + at, mask=mask, other=0.0, cache_modifier=".cg")
                whole += tl.exp2(log - shift)[:, None] * part
                weights += tl.exp2(log - shift)
            whole = whole / tl.where(weights > 0, weights, 1.0)[:, None]
            tl.store(out + tile.to(tl.int64) * size + at, whole.to(out.dtype.element_ty), mask=mask)
            tl.store(arrivals + first, 0)
