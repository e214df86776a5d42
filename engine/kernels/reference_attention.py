"""Attention and the paged KV cache in plain torch: the other half of `engine.kernels.reference`, under its rules.

An int8 cache is never dequantized. With k = s * code + z and v = t * code + y, code = byte - 128:
- q k = (q * s) code + q z. Where s and z belong to channels, s goes into the query once and q z is the same for all
  keys of a query, so softmax does not see it. Where they belong to tokens, s multiplies a column of scores and z, times
  the sum of the query, is added to it.
- sum w v = t * (sum w code) + y, because the weights w sum to 1: V's channels are scaled after the sum. Where t and y
  belong to tokens, it is sum (w t) code + sum w y.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

# Rows of queries scored at a time: bounds the score matrix to heads * 128 * context floats.
QUERY_BLOCK = 128
# Floats of K gathered at a time for decoding sequences, longest first: 1 MiB stays in a core's cache (gathering 3.5 MiB
# at once took 13 times as long as 0.9 MiB), and sequences of like length share little padding.
GATHERED_FLOATS = 1 << 18
# Byte of the zero point, and steps from the lowest byte to the highest.
MIDDLE, STEPS = 128, 255


class Pages(Protocol):
    """One layer of a paged KV cache: key and value [num_pages, kv_heads, page_len, head_dim].

    uint8 pages come with float32 scales and zero points, in pairs: [kv_heads, 1 or head_dim, 2] where they are fixed,
    [num_pages, kv_heads, page_len, 2] where every token has its own; other pages have None there.
    """

    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def key_scales(self) -> Tensor | None: ...
    @property
    def value_scales(self) -> Tensor | None: ...


class PagedQueries(Protocol):
    """What attention needs to know of a batch: int32 query_starts [B+1], context_lens [B], page_table [B, P]."""

    @property
    def query_starts(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def page_table(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Context:
    """K and V of B sequences, float32 [B, kv_heads, L, head_dim]; codes where the cache is int8.

    `key_pairs`, `value_pairs`: scale and zero point of every token, [B, kv_heads, L, 2], where tokens have their own.
    """

    key: Tensor
    value: Tensor
    key_pairs: Tensor | None = None
    value_pairs: Tensor | None = None

    def of_first(self, start: int, end: int) -> _Context:
        """Tokens `start` to `end` of the first sequence, without the dimension of sequences."""
        parts = (self.key, self.value, self.key_pairs, self.value_pairs)
        return _Context(*(None if part is None else part[0, :, start:end] for part in parts))  # type: ignore[arg-type]


def quantize_kv(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """clamp(round_half_even((x - zero) / scale + 128), 0, 255) as uint8; scale and zero broadcast against x."""
    return ((x.float() - zero) / scale + float(MIDDLE)).round().clamp(0, STEPS).to(torch.uint8)


def dequantize_kv(stored: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(byte - 128) * scale + zero in float32; scale and zero broadcast against the bytes."""
    return (stored.float() - MIDDLE) * scale + zero


def kv_range(low: Tensor, high: Tensor) -> Tensor:
    """Scale and zero point [..., 2] of values between `low` and `high`: (high - low) / 255 and (low + high) / 2.

    The scale is never 0. A range of one value has that value's float32 precision there, and the value, as the zero
    point, is exact.
    """
    low, high = low.float(), high.float()
    zero = (low + high) / 2
    least = torch.finfo(torch.float32)
    scale = torch.maximum((high - low) / STEPS, (zero.abs() * least.eps).clamp(min=least.tiny))
    return torch.stack((scale, zero), dim=-1)


def of_tokens(pairs: Tensor) -> bool:
    """Whether scales and zero points of pages are each token's own, and not fixed."""
    return pairs.dim() == 4


def write_kv(key: Tensor, value: Tensor, pages: Pages, slots: Tensor) -> None:
    """Writes key (already rotated) and value [T, kv_heads, head_dim] into the pages at slots [T].

    Where tokens have scales of their own, those of a token and head are of its own lowest and highest value.
    """
    page_len = pages.key.shape[2]
    page, offset = slots // page_len, slots % page_len
    for new, stored, pairs in (
        (key, pages.key, pages.key_scales),
        (value, pages.value, pages.value_scales),
    ):
        if pairs is not None:
            if of_tokens(pairs):
                pairs[page, :, offset] = own = kv_range(*new.aminmax(dim=-1))
                new = quantize_kv(new, *own.unsqueeze(-2).unbind(-1))
            else:
                new = quantize_kv(new, *pairs.unbind(-1))
        stored[page, :, offset] = new.to(stored.dtype)


def paged_attention(
    query: Tensor, pages: Pages, batch: PagedQueries, scale: float, window: int | None = None
) -> Tensor:
    """softmax(q k^T * scale) v over the cached context of each sequence, causally; [T, heads, head_dim] like `query`.

    The tokens of `query` are the last ones of their context, and their K and V have been written. Of int8 pages the
    result is that of what they stand for, the newest token's too (see this file's beginning).
    Heads are grouped: query head h reads KV head h // (heads / kv_heads).
    A token sees the last `window` tokens, itself among them, or all with None.
    """
    kv_heads, head_dim = pages.key.shape[1], pages.key.shape[3]
    starts, lens = batch.query_starts.tolist(), batch.context_lens.tolist()
    grouped = query.float().view(len(query), kv_heads, -1, head_dim) * scale
    if pages.key_scales is not None and not of_tokens(pages.key_scales):
        grouped = grouped * pages.key_scales[:, None, :, 0]
    out = torch.empty_like(grouped)
    decoding = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == 1]
    decoding.sort(key=lens.__getitem__, reverse=True)
    while decoding:
        longest = lens[decoding[0]]
        fitting = max(1, GATHERED_FLOATS // (longest * kv_heads * head_dim))
        group, decoding = decoding[:fitting], decoding[fitting:]
        rows = batch.query_starts[:-1][group].long()
        context = _gather(pages, batch.page_table[group], longest)
        out[rows] = _attend_from_last(grouped[rows], context, batch.context_lens[group], window)
    for b, length in enumerate(lens):
        first, last = starts[b], starts[b + 1]
        if last - first > 1:
            context = _gather(pages, batch.page_table[b : b + 1], length)
            out[first:last] = _attend_causal(grouped[first:last], context, window)
    if pages.value_scales is not None and not of_tokens(pages.value_scales):
        value_scale, value_zero = pages.value_scales[:, None].unbind(-1)
        out = out * value_scale + value_zero
    return out.view(query.shape).to(query.dtype)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of packed whole sequences without a cache.

    q [T, heads, head_dim]; k, v [T, kv_heads, head_dim]; `starts` [B+1] cumulative lengths; the result is like q.
    `window` is that of `paged_attention`.
    """
    if q.is_cuda and window is None:
        return _fused_causal_attention(q, k, v, starts, scale)
    kv_heads, head_dim = k.shape[1], k.shape[2]
    grouped = q.float().reshape(len(q), kv_heads, -1, head_dim) * scale
    out = torch.empty_like(grouped)
    for first, last in pairwise(starts.tolist()):
        context = _Context(*(x[first:last].float().transpose(0, 1)[None] for x in (k, v)))
        out[first:last] = _attend_causal(grouped[first:last], context, window)
    return out.view(q.shape).to(q.dtype)


def _fused_causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """The same by torch's fused kernel, which keeps no scores: for whole sequences on a GPU."""
    out = torch.empty_like(q)
    for first, last in pairwise(starts.tolist()):
        query, key, value = (x[first:last].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[first:last] = attended[0].transpose(0, 1)
    return out


def _gather(pages: Pages, table: Tensor, length: int) -> _Context:
    """The first `length` cached tokens of the sequences of `table`."""
    _, kv_heads, page_len, _ = pages.key.shape
    used = table[:, : -(-length // page_len)].long().clamp(min=0)
    heads = torch.arange(kv_heads, device=table.device)
    # One copy straight into attention's order: a row is one head's part of one page.
    rows = (used[:, None] * kv_heads + heads[:, None]).flatten()

    def gathered(stored: Tensor) -> Tensor:
        flat = stored.view(-1, page_len * stored.shape[3]).index_select(0, rows)
        wide = flat.view(len(table), kv_heads, -1, stored.shape[3])[:, :, :length].float()
        return wide.sub_(MIDDLE) if stored.dtype == torch.uint8 else wide

    pairs = (
        gathered(pairs) if pairs is not None and of_tokens(pairs) else None
        for pairs in (pages.key_scales, pages.value_scales)
    )
    return _Context(gathered(pages.key), gathered(pages.value), *pairs)


def _scores(query: Tensor, key: Tensor, pairs: Tensor | None) -> Tensor:
    """q k^T of query [..., n, head_dim] and key [..., L, head_dim]: [..., n, L], where k = scale * key + zero."""
    scores = query @ key.transpose(-1, -2)
    if pairs is None:
        return scores
    scale, zero = pairs.unsqueeze(-3).unbind(-1)
    return scores * scale + query.sum(-1, keepdim=True) * zero


def _weighted(weights: Tensor, value: Tensor, pairs: Tensor | None) -> Tensor:
    """Weights [..., n, L] times v [..., L, head_dim], where v = scale * value + zero: [..., n, head_dim]."""
    if pairs is None:
        return weights @ value
    scale, zero = pairs.unsqueeze(-3).unbind(-1)
    return (weights * scale) @ value + (weights * zero).sum(-1, keepdim=True)


def _attend_from_last(query: Tensor, context: _Context, lens: Tensor, window: int | None) -> Tensor:
    """One query per sequence [B, kv_heads, group, head_dim] over a context of which lens [B] are real; like `query`."""
    scores = _scores(query, context.key, context.key_pairs)
    places = torch.arange(scores.shape[-1], device=query.device)
    absent = places >= lens[:, None]
    if window is not None:
        absent |= places < lens[:, None] - window
    weights = scores.masked_fill_(absent[:, None, None], float("-inf")).softmax(-1)
    return _weighted(weights, context.value, context.value_pairs)


def _attend_causal(query: Tensor, context: _Context, window: int | None) -> Tensor:
    """The last T positions [T, kv_heads, group, head_dim] of one sequence over all of its context; like `query`."""
    tokens, kv_heads, group, head_dim = query.shape
    length = context.key.shape[2]
    grouped = query.permute(1, 2, 0, 3)
    out = torch.empty(kv_heads, group, tokens, head_dim, device=query.device)
    for first in range(0, tokens, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, tokens)
        # Keys from `oldest`, which the block's first query still sees, to `end`, which its last query is.
        end = length - tokens + last
        oldest = 0 if window is None else max(0, end - (last - first) + 1 - window)
        block, seen = grouped[:, :, first:last].reshape(kv_heads, -1, head_dim), end - oldest
        part = context.of_first(oldest, end)
        scores = _scores(block, part.key, part.key_pairs).view(kv_heads, group, last - first, seen)
        hidden = torch.ones(last - first, seen, dtype=torch.bool, device=query.device)
        hidden = hidden.triu(seen - (last - first) + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(seen - (last - first) - window)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).view(kv_heads, -1, seen)
        summed = _weighted(weights, part.value, part.value_pairs)
        out[:, :, first:last] = summed.view(kv_heads, group, last - first, head_dim)
    return out.permute(2, 0, 1, 3)
