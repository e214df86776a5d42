"""Every op of the decoder in plain torch: the CPU path, and the specification that faster kernels are tested against.

Whatever the type of the inputs, sums and exponentials are float32 and the result is rounded once to the input's type.
(Above 300 lines: the whole of what kernels are held to is in one place.)
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.rotation import rotate

# Nibble p of a packed word holds column AWQ_ORDER[p] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Queries of one sequence that attention takes at a time, in the kernels too; here it bounds the score matrix to
# heads * 128 * context floats.
QUERY_BLOCK = 128
# Floats of K gathered at a time for decoding sequences, longest first: 1 MiB stays in a core's cache (gathering 3.5 MiB
# at once took 13 times as long as 0.9 MiB), and sequences of like length share little padding.
GATHERED_FLOATS = 1 << 18
LARGEST_HALF = 65504.0
# The finest scale of a token's int8 K or V. Below it float16, which has steps of 2^-24 there, would round it by so much
# that values at the ends of the range were clamped by more than half a step.
SMALLEST_STEP = 2.0**-17
# The largest code of symmetric int8: -128 is not used, so that a sign costs nothing.
INT8_MAX = 127
# What an absolute maximum counts as at least: the scale of a row of zeros is finite and not 0.
SMALLEST_ABSMAX = 1e-7
# Products of int8 summed in float32 at a time: 1024 * 128 * 128 = 2^24, up to which it holds every whole number.
EXACT_TERMS = 1024


class Pages(Protocol):
    """One layer of a paged KV cache: key and value [num_pages, kv_heads, page_len, head_dim].

    uint8 pages come with float32 scales and zero points [kv_heads, head_dim], which are those of all tokens, or with
    float16 steps [num_pages, kv_heads, page_len, 2], a scale and a zero point for each token. Other pages have None
    there.
    """

    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def key_scale(self) -> Tensor | None: ...
    @property
    def key_zero(self) -> Tensor | None: ...
    @property
    def value_scale(self) -> Tensor | None: ...
    @property
    def value_zero(self) -> Tensor | None: ...
    @property
    def key_steps(self) -> Tensor | None: ...
    @property
    def value_steps(self) -> Tensor | None: ...


class PagedQueries(Protocol):
    """What attention needs to know of a batch: int32 query_starts [B+1], context_lens [B], page_table [B, P]."""

    @property
    def query_starts(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def page_table(self) -> Tensor: ...


def begin_step(
    token_ids: Tensor, drawn: Tensor | None, embedding: Tensor, positions: Tensor, frequencies: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, hidden] of the embedding, and cos and sin of position * frequency, times `factor`: float32 [T, D/2].

    A token of `token_ids` [T] that is -(row + 1) is that of `drawn` at `row`. frequencies float32 [D/2] or [T, D/2].
    """
    if drawn is not None:
        token_ids = torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)], token_ids)
    angles = positions.to(torch.float32)[:, None] * frequencies
    rows = torch.nn.functional.embedding(token_ids, embedding)
    return rows, angles.cos() * factor, angles.sin() * factor


def likeliest(logits: Tensor, ignoring: Tensor, eos_token_ids: Tensor, out: Tensor, copy: Tensor | None = None) -> None:
    """Writes the likeliest token of each row of logits [R, vocab], the first of several, to `out` int64 [R]; without
    the end tokens where `ignoring` [R] is true. `copy` [R, vocab] takes the logits as they are given."""
    if copy is not None:
        copy.copy_(logits)
    given = logits[:, eos_token_ids]
    logits[:, eos_token_ids] = given.masked_fill(ignoring[:, None] != 0, -torch.inf)
    torch.argmax(logits, dim=-1, out=out)
    logits[:, eos_token_ids] = given


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for [..., 2 * inner] with the gate in the first half; [..., inner]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def quantize_rows(x: Tensor, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of every row: values [..., in] and float32 scales [...] with x = values * scale, nearly.

    `maxima` float32 [...] are the largest magnitudes of whole rows, of which x may be a part; without, those of x.

    scale = max(absmax, 1e-7) / 127, value = clamp(round_half_even(x / scale), -127, 127), in float32 with a division
    that is rounded to nearest. A row of zeros has zeros and a usable scale. A row with NaN or Inf has a scale that is
    not finite and 0 where it is: everything computed from it is NaN, as it would be in floats.
    """
    wide = x.float()
    scales = (wide.abs().amax(-1) if maxima is None else maxima).clamp(min=SMALLEST_ABSMAX)
    scales = scales / torch.full_like(scales, INT8_MAX)  # by a number, a GPU would multiply by its rounded reciprocal
    values = (wide / scales.unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values.nan_to_num_(0.0).to(torch.int8), scales


def rms_norm_int8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the RMS norm in float32: what is normalized is NOT rounded to x's type in between."""
    return quantize_rows(rms_norm(x.float(), weight, eps))


def silu_and_mul_int8(gate_up: Tensor, maxima: Tensor | None = None, rotated: int = 0) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of silu(gate) * up in float32, `rotated` by blocks of so many channels: nothing is rounded to the
    input's type in between."""
    return quantize_rows(rotate(silu_and_mul(gate_up.float()), rotated), maxima)


def row_maxima(x: Tensor, *, gated: bool, rotated: int = 0) -> Tensor:
    """The largest magnitude of each row of x [..., in], float32 [...]: what `quantize_rows` takes, or where it is
    `gated` what `silu_and_mul_int8` does. A NaN counts as infinite, which not every sum over ranks would hand on."""
    wide = rotate(silu_and_mul(x.float()), rotated) if gated else x.float()
    return wide.abs().amax(-1).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def int8_linear(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x W^T of int8 x [T, in] and weight [out, in], times both scales (float32 [T] and [out]); `dtype` [T, out].

    The sum of products is exact (int32), so it depends on nothing but its row and column. Then, in float32 and in this
    order: sum * x_scale * weight_scale + bias, rounded once to `dtype`.
    """
    return scale_products(int8_products(x, weight), x_scales, weight_scales, bias, dtype)


def scale_products(
    products: Tensor, x_scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The second half of `int8_linear`, from `int8_products` [T, out]."""
    out = products.float() * x_scales.unsqueeze(-1) * weight_scales
    return (out if bias is None else out + bias.float()).to(dtype)


def int8_products(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of int8 matrices [T, in] and [out, in], exactly: int32 [T, out]."""
    # A column of one value has two readings of its strides, and torch's product takes the wrong one.
    if not x.is_cuda and x.shape[1] > 1 and _int_mm_is_exact():
        return torch._int_mm(x, weight.t())
    out = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    for first in range(0, x.shape[1], EXACT_TERMS):
        terms = slice(first, first + EXACT_TERMS)
        out += (x[:, terms].float() @ weight[:, terms].float().t()).int()
    return out


@cache
def _int_mm_is_exact() -> bool:
    """Whether this process' int8 product is right: without VNNI, oneDNN adds pairs of products in 16 bits, and they
    saturate in silence."""
    for tokens in (1, 33):
        x, weight = torch.full((tokens, 64), 127, dtype=torch.int8), torch.full((32, 64), 127, dtype=torch.int8)
        weight[1::2] = -128
        if not torch.equal(torch._int_mm(x, weight.t()), x.int() @ weight.int().t()):
            return False
    return True


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turns the pairs (j, j + head_dim/2) of q, k [T, heads, head_dim] by the angles of cos, sin [T, head_dim/2].

    q is also multiplied by `query_scale` [T], where that is given.
    """
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    if query_scale is None:
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    scale = query_scale.float()[:, None, None]
    return _rotate(q, cos * scale, sin * scale), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def quantize_kv(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """clamp(round_half_even((x - zero) / scale + 128), 0, 255) as uint8; scale and zero broadcast against x.

    A value out of range, infinity too, becomes the nearest that the bytes can say. NaN counts as 0.
    """
    return ((x.float().nan_to_num(0.0) - zero) / scale + 128.0).round().clamp(0, 255).to(torch.uint8)


def dequantize_kv(stored: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(byte - 128) * scale + zero in float32; scale and zero broadcast against the bytes."""
    return (stored.float() - 128.0) * scale + zero


def token_steps(x: Tensor) -> Tensor:
    """The scale and zero point of every row of x [..., head_dim] by its own range: float16 [..., 2].

    With NaN counted as 0 and x cut off at float16's range: zero = float16((max + min) / 2), and
    scale = float16(max(r / 127.5, SMALLEST_STEP)), r being the distance of that zero to the farther of min and max.
    So float16's rounding of zero costs no clamping, and a row of one value is exact to SMALLEST_STEP / 2 or, where that
    is more, to 2^-18 of it.
    """
    low, high = x.float().nan_to_num(0.0).clamp(-LARGEST_HALF, LARGEST_HALF).aminmax(dim=-1)
    zero = ((high + low) / 2).half()
    reach = torch.maximum(high - zero.float(), zero.float() - low)
    return torch.stack([(reach / 127.5).clamp(min=SMALLEST_STEP).half(), zero], dim=-1)


def write_kv(key: Tensor, value: Tensor, pages: Pages, slots: Tensor) -> None:
    """Writes key (already rotated) and value [T, kv_heads, head_dim] into the pages at slots [T]."""
    page_len = pages.key.shape[2]
    page, offset = slots // page_len, slots % page_len
    for new, stored, scale, zero, steps in (
        (key, pages.key, pages.key_scale, pages.key_zero, pages.key_steps),
        (value, pages.value, pages.value_scale, pages.value_zero, pages.value_steps),
    ):
        if steps is not None:
            taken = token_steps(new)
            steps[page, :, offset] = taken
            scale, zero = taken.float().chunk(2, dim=-1)
        if scale is not None and zero is not None:
            new = quantize_kv(new, scale, zero)
        stored[page, :, offset] = new.to(stored.dtype)


def paged_attention(
    query: Tensor, pages: Pages, batch: PagedQueries, scale: float, window: int | None = None
) -> Tensor:
    """softmax(q k^T * scale) v over the cached context of each sequence, causally; [T, heads, head_dim] like `query`.

    The tokens of `query` are the last ones of their context, and their K and V have been written. int8 pages are read
    dequantized, the newest token's too. Heads are grouped: query head h reads KV head h // (heads / kv_heads).
    A token sees the last `window` tokens, itself among them, or all with None. One of a sequence without a context, as
    padded batches have it, gets zeros.
    """
    starts, lens = batch.query_starts.tolist(), batch.context_lens.tolist()
    out = torch.zeros_like(query)
    decoding = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == 1 and lens[b]]
    decoding.sort(key=lens.__getitem__, reverse=True)
    while decoding:
        longest = lens[decoding[0]]
        fitting = max(1, GATHERED_FLOATS // (longest * pages.key.shape[1] * pages.key.shape[3]))
        group, decoding = decoding[:fitting], decoding[fitting:]
        rows = batch.query_starts[:-1][group].long()
        key, value = gather_pages(pages, batch.page_table[group], longest)
        out[rows] = _attend_from_last(query[rows], key, value, batch.context_lens[group], scale, window).to(out.dtype)
    for b, length in enumerate(lens):
        first, last = starts[b], starts[b + 1]
        if last - first > 1 and length:
            key, value = gather_pages(pages, batch.page_table[b : b + 1], length)
            out[first:last] = _attend_causal(query[first:last], key[0], value[0], scale, window).to(out.dtype)
    return out


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of packed whole sequences without a cache.

    q [T, heads, head_dim]; k, v [T, kv_heads, head_dim]; `starts` [B+1] cumulative lengths; the result is like q.
    `window` is that of `paged_attention`.
    """
    if q.is_cuda and window is None:
        return _fused_causal_attention(q, k, v, starts, scale)
    out = torch.empty_like(q)
    for first, last in pairwise(starts.tolist()):
        key, value = (x[first:last].float().transpose(0, 1) for x in (k, v))
        out[first:last] = _attend_causal(q[first:last], key, value, scale, window).to(out.dtype)
    return out


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


def gather_pages(pages: Pages, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` cached K and V of the sequences of `table`, in float32: [B, kv_heads, length, head_dim]."""
    _, kv_heads, page_len, head_dim = pages.key.shape
    used = table[:, : -(-length // page_len)].long().clamp(min=0)
    heads = torch.arange(kv_heads, device=table.device)
    # One copy straight into attention's order: a row is one head's part of one page.
    rows = (used[:, None] * kv_heads + heads[:, None]).flatten()

    def taken(stored: Tensor, width: int) -> Tensor:
        flat = stored.view(-1, page_len * width).index_select(0, rows)
        return flat.view(len(table), kv_heads, -1, width)[:, :, :length]

    gathered = []
    for stored, scale, zero, steps in (
        (pages.key, pages.key_scale, pages.key_zero, pages.key_steps),
        (pages.value, pages.value_scale, pages.value_zero, pages.value_steps),
    ):
        dense = taken(stored, head_dim)
        if steps is not None:
            gathered.append(dequantize_kv(dense, *taken(steps, 2).float().chunk(2, dim=-1)))
        elif scale is not None and zero is not None:
            gathered.append(dequantize_kv(dense, scale[:, None], zero[:, None]))
        else:
            gathered.append(dense.float())
    return gathered[0], gathered[1]


def _attend_from_last(
    query: Tensor, key: Tensor, value: Tensor, lens: Tensor, scale: float, window: int | None
) -> Tensor:
    """One query per sequence [B, heads, D] over key, value [B, kv_heads, L, D], of which lens [B] are real."""
    batch, heads, head_dim = query.shape
    kv_heads, longest = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = (grouped * scale) @ key.transpose(-1, -2)
    places = torch.arange(longest, device=query.device)
    absent = places >= lens[:, None]
    if window is not None:
        absent |= places < lens[:, None] - window
    weights = scores.masked_fill_(absent[:, None, None], float("-inf")).softmax(-1)
    return (weights @ value).view(batch, heads, head_dim)


def _attend_causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """The last T positions [T, heads, D] of one sequence over all its key, value [kv_heads, L, D]."""
    tokens, heads, head_dim = query.shape
    kv_heads, length = key.shape[0], key.shape[1]
    group = heads // kv_heads
    grouped = (query.float() * scale).reshape(tokens, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out = torch.empty(kv_heads, group, tokens, head_dim, device=query.device)
    for first in range(0, tokens, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, tokens)
        # Keys from `oldest`, which the block's first query still sees, to `end`, which its last query is.
        end = length - tokens + last
        oldest = 0 if window is None else max(0, end - (last - first) + 1 - window)
        block, seen = grouped[:, :, first:last].reshape(kv_heads, -1, head_dim), end - oldest
        scores = (block @ key[:, oldest:end].transpose(1, 2)).view(kv_heads, group, last - first, seen)
        hidden = torch.ones(last - first, seen, dtype=torch.bool, device=query.device)
        hidden = hidden.triu(seen - (last - first) + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(seen - (last - first) - window)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).view(kv_heads, -1, seen)
        out[:, :, first:last] = (weights @ value[:, oldest:end]).view(kv_heads, group, last - first, head_dim)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [R, C] packed in AWQ order -> the int32 values 0..15 [R, 8 * C] in natural column order."""
    nibble_of_column = [AWQ_ORDER.index(column) for column in range(8)]
    shifts = torch.tensor(nibble_of_column, dtype=torch.int32, device=words.device) * 4
    return ((words[..., None] >> shifts) & 15).flatten(1)


def unpack_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """(q - z) * s as a dense float32 weight [out, in], from the AWQ layout.

    qweight int32 [in, out/8]; qzeros int32 [in/g, out/8]; scales float16 [in/g, out], g being the group size.
    """
    group_size = qweight.shape[0] // scales.shape[0]
    zeros = unpack_nibbles(qzeros).repeat_interleave(group_size, dim=0)
    steps = (unpack_nibbles(qweight) - zeros).float()
    return (steps * scales.float().repeat_interleave(group_size, dim=0)).t().contiguous()
