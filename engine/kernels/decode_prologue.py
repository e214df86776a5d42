# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""What `rope_write_kv` does for one new token a sequence, inside the kernel of its attention: a launch less, which
matters where so few sequences decode that a launch costs as much as its work."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.page_rows import CHANNELS, PLAIN
from engine.kernels.rope_write_kv import byte_of, steps_of


@triton.jit
def turned(
    row,
    turning,
    weight,
    token,
    column,
    mask,
    eps,
    head_dim: tl.constexpr,
    norms: tl.constexpr,
    kind: tl.constexpr,
    many: tl.constexpr,
):
    """Heads normed with `weight` (and rounded to `kind`) and rotated, in float32. `row` points to their first values.

    column [padded] for one head, [1, padded] beside pointers [rows, 1] for many; mask says which values there are. A
    rotated value needs the one half a head away, which is loaded as well.
    """
    half: tl.constexpr = head_dim // 2
    upper = column >= half
    partner = tl.where(upper, column - half, column + half)
    pair = tl.where(upper, column - half, column)
    here = column < head_dim
    own = tl.load(row + column, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row + partner, mask=mask, other=0.0).to(tl.float32)
    if norms:
        if many:
            factor = tl.rsqrt(tl.sum(own * own, axis=1) / head_dim + eps)[:, None]
        else:
            factor = tl.rsqrt(tl.sum(own * own, axis=0) / head_dim + eps)
        own = (own * factor * tl.load(weight + column, mask=here, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        other = other * factor * tl.load(weight + partner, mask=here, other=0.0).to(tl.float32)
        other = other.to(kind).to(tl.float32)
    c = tl.load(turning[0] + token * half + pair, mask=here, other=0.0)
    s = tl.load(turning[1] + token * half + pair, mask=here, other=0.0)
    return own * c + tl.where(upper, 1.0, -1.0) * other * s


@triton.jit
def write_token(
    qkv,
    turning,
    key_norm,
    pages,
    slot,
    token,
    kv_head,
    heads,
    column,
    eps,
    kv_heads: tl.constexpr,
    page_len: tl.constexpr,
    head_dim: tl.constexpr,
    norms: tl.constexpr,
    stored: tl.constexpr,
):
    """K and V of a token, of one KV head, to its slot; what this program loads afterwards finds them there."""
    key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps = pages
    place = ((slot // page_len).to(tl.int64) * kv_heads + kv_head) * page_len + slot % page_len
    kind: tl.constexpr = qkv.dtype.element_ty
    here = column < head_dim
    row = qkv + (heads + kv_head) * head_dim
    k = turned(row, turning, key_norm, token, column, here, eps, head_dim, norms, kind, False)
    k = k.to(kind).to(tl.float32)
    store_row(key, key_scale, key_zero, key_steps, place, kv_head, k, column, head_dim, stored)
    v = tl.load(row + kv_heads * head_dim + column, mask=here, other=0.0).to(tl.float32)
    store_row(value, value_scale, value_zero, value_steps, place, kv_head, v, column, head_dim, stored)
    tl.debug_barrier()  # every thread's values are written before another one reads them


@triton.jit
def store_row(pages, scales, zeros, steps, place, head, row, column, head_dim: tl.constexpr, stored: tl.constexpr):
    """A row [padded] of K or V to its place in the pages, as they store it."""
    here = column < head_dim
    at = pages + place * head_dim + column
    if stored == PLAIN:
        tl.store(at, row.to(pages.dtype.element_ty), mask=here)
    else:
        row = tl.where(row == row, row, 0.0)  # NaN counts as 0
        if stored == CHANNELS:
            scale = tl.load(scales + head * head_dim + column, mask=here, other=1.0)
            zero = tl.load(zeros + head * head_dim + column, mask=here, other=0.0)
        else:
            bound: tl.constexpr = 65504.0
            cut = tl.minimum(tl.maximum(row, -bound), bound)
            low = tl.min(tl.where(here, cut, float("inf")), axis=0)
            step, middle = steps_of(low, tl.max(tl.where(here, cut, float("-inf")), axis=0))
            tl.store(steps + place * 2, step)
            tl.store(steps + place * 2 + 1, middle)
            scale = step.to(tl.float32)
            zero = middle.to(tl.float32)
        tl.store(at, byte_of(row, scale, zero), mask=here)
