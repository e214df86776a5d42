# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""From the output of qkv to rotated queries and pages that hold K and V: one kernel for head norms, rotation,
rounding to int8 and the write."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import depend, options
from engine.kernels.device import facts
from engine.kernels.page_rows import CHANNELS, PLAIN, storage_of
from engine.kernels.reference import Pages
from engine.kernels.rounding import ROUNDER

SMALLEST_STEP = tl.constexpr(2.0**-17)  # reference.SMALLEST_STEP


def rope_write_kv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_scale: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    pages: Pages,
    slots: Tensor,
    heads: int,
) -> Tensor:
    """The contract of `reference.rope_write_kv`."""
    _, kv_heads, page_len, head_dim = pages.key.shape
    tokens = len(qkv)
    query = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if not tokens:
        return query
    steps = pages.key_steps is not None
    quantized = pages.key_scale is not None
    block = math.gcd(math.gcd(heads, kv_heads), 8)
    half = head_dim // 2
    padded = triton.next_power_of_2(half)
    none = qkv  # stands for every pointer that the kernel does not touch
    grid = (tokens, (heads + 2 * kv_heads) // block)
    _rope_write_kv[grid](
        qkv,
        cos,
        sin,
        none if query_scale is None else query_scale,
        none if head_norms is None else head_norms[0],
        none if head_norms is None else head_norms[1],
        query,
        pages.key,
        pages.value,
        pages.key_scale if quantized else none,
        pages.key_zero if quantized else none,
        pages.value_scale if quantized else none,
        pages.value_zero if quantized else none,
        pages.key_steps if steps else none,
        pages.value_steps if steps else none,
        slots,
        qkv.stride(0),
        eps,
        heads=heads,
        kv_heads=kv_heads,
        page_len=page_len,
        half=half,
        padded=padded,
        block=block,
        norms=head_norms is not None,
        scaled=query_scale is not None,
        stored=storage_of(pages),
        num_warps=max(1, min(4, block * padded // 128)),
        **options(facts(qkv.device)),
    )
    return query


@triton.jit
def _store(pages, scales, zeros, steps, slot, head, first, second, pair, inside, kv_heads, page_len, half, stored):
    """Rows `first` and `second` [block, padded], the halves of the heads, into the page."""
    page, offset = slot // page_len, slot % page_len
    place = (page * kv_heads + head) * page_len + offset
    at = place[:, None] * (2 * half) + pair[None, :]
    if stored != PLAIN:
        first = tl.where(first == first, first, 0.0)  # NaN counts as 0
        second = tl.where(second == second, second, 0.0)
    if stored == PLAIN:
        tl.store(pages + at, first.to(pages.dtype.element_ty), mask=inside)
        tl.store(pages + at + half, second.to(pages.dtype.element_ty), mask=inside)
    else:
        if stored == CHANNELS:
            where = head[:, None] * (2 * half) + pair[None, :]
            scale = tl.load(scales + where, mask=inside, other=1.0)
            zero = tl.load(zeros + where, mask=inside, other=0.0)
            scale_2 = tl.load(scales + where + half, mask=inside, other=1.0)
            zero_2 = tl.load(zeros + where + half, mask=inside, other=0.0)
        else:
            bound: tl.constexpr = 65504.0
            first_cut = tl.minimum(tl.maximum(first, -bound), bound)
            second_cut = tl.minimum(tl.maximum(second, -bound), bound)
            low = tl.minimum(
                tl.min(tl.where(inside, first_cut, float("inf")), axis=1),
                tl.min(tl.where(inside, second_cut, float("inf")), axis=1),
            )
            high = tl.maximum(
                tl.max(tl.where(inside, first_cut, float("-inf")), axis=1),
                tl.max(tl.where(inside, second_cut, float("-inf")), axis=1),
            )
            step, middle = steps_of(low, high)
            tl.store(steps + place * 2, step)
            tl.store(steps + place * 2 + 1, middle)
            scale = step.to(tl.float32)[:, None]
            zero = middle.to(tl.float32)[:, None]
            scale_2 = scale
            zero_2 = zero
        tl.store(pages + at, byte_of(first, scale, zero), mask=inside)
        tl.store(pages + at + half, byte_of(second, scale_2, zero_2), mask=inside)


@triton.jit
def steps_of(low, high):
    """Scale and zero point of rows by their range: `reference.token_steps`."""
    zero = ((high + low) / 2).to(tl.float16)
    reach = tl.maximum(high - zero.to(tl.float32), zero.to(tl.float32) - low)
    return tl.maximum(tl.div_rn(reach, 127.5), SMALLEST_STEP).to(tl.float16), zero


@triton.jit
def byte_of(x, scale, zero):
    step = tl.minimum(tl.maximum(tl.div_rn(x - zero, scale) + 128.0, 0.0), 255.0)
    return ((step + ROUNDER) - ROUNDER).to(tl.uint8)


@triton.jit
def _rope_write_kv(
    qkv,
    cos,
    sin,
    query_scale,
    query_norm,
    key_norm,
    query,
    key_pages,
    value_pages,
    key_scale,
    key_zero,
    value_scale,
    value_zero,
    key_steps,
    value_steps,
    slots,
    stride,
    eps,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    page_len: tl.constexpr,
    half: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
    norms: tl.constexpr,
    scaled: tl.constexpr,
    stored: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * block
    pair = tl.arange(0, padded)
    here = pair < half
    inside = here[None, :] & (tl.arange(0, block) < block)[:, None]
    if PDL:
        depend()
    slot = tl.load(slots + token).to(tl.int64)
    c = tl.load(cos + token * half + pair, mask=here, other=0.0)[None, :]
    s = tl.load(sin + token * half + pair, mask=here, other=0.0)[None, :]
    at = token * stride + (first_head + tl.arange(0, block))[:, None] * (2 * half) + pair[None, :]
    first = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + half, mask=inside, other=0.0).to(tl.float32)
    if first_head < heads + kv_heads:  # queries and keys
        kind: tl.constexpr = query.dtype.element_ty
        if norms:
            weights = query_norm
            if first_head >= heads:
                weights = key_norm
            power = tl.sum(first * first + second * second, axis=1)
            factor = tl.rsqrt(power / (2 * half) + eps)[:, None]
            weight = tl.load(weights + pair, mask=here, other=0.0).to(tl.float32)[None, :]
            weight_2 = tl.load(weights + half + pair, mask=here, other=0.0).to(tl.float32)[None, :]
            first = (first * factor * weight).to(kind).to(tl.float32)
            second = (second * factor * weight_2).to(kind).to(tl.float32)
        if scaled:  # noqa: SIM102 - the first is known when compiling
            if first_head < heads:
                length = tl.load(query_scale + token)
                c = c * length
                s = s * length
        turned = (first * c - second * s).to(kind)
        turned_2 = (second * c + first * s).to(kind)
        if first_head < heads:
            to = (token * heads + first_head + tl.arange(0, block))[:, None] * (2 * half) + pair[None, :]
            tl.store(query + to, turned, mask=inside)
            tl.store(query + to + half, turned_2, mask=inside)
        else:
            head = first_head - heads + tl.arange(0, block)
            _store(
                key_pages,
                key_scale,
                key_zero,
                key_steps,
                slot,
                head,
                turned.to(tl.float32),
                turned_2.to(tl.float32),
                pair,
                inside,
                kv_heads,
                page_len,
                half,
                stored,
            )
    else:
        head = first_head - heads - kv_heads + tl.arange(0, block)
        _store(
            value_pages,
            value_scale,
            value_zero,
            value_steps,
            slot,
            head,
            first,
            second,
            pair,
            inside,
            kv_heads,
            page_len,
            half,
            stored,
        )
