# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""How kernels read rows of K and V from pages: whole pages at a time, bytes as words of four."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.dependent_launch import prefetch
from engine.kernels.reference import Pages

# What lies beside the bytes: nothing (values as computed), scales of channels, or scales of tokens.
PLAIN, CHANNELS, TOKENS = (tl.constexpr(name) for name in ("plain", "channels", "tokens"))


def storage_of(pages: Pages) -> str:
    """The value of PLAIN, CHANNELS or TOKENS."""
    stored = TOKENS if pages.key_steps is not None else CHANNELS if pages.key_scale is not None else PLAIN
    return str(stored.value)


def pointers(pages: Pages, unused: Tensor) -> tuple[Tensor, ...]:
    """key, value, key_scale, key_zero, value_scale, value_zero, key_steps, value_steps for a kernel; `unused` stands
    for those that are not there."""
    beside = (
        pages.key_scale,
        pages.key_zero,
        pages.value_scale,
        pages.value_zero,
        pages.key_steps,
        pages.value_steps,
    )
    return pages.key, pages.value, *(unused if tensor is None else tensor for tensor in beside)


@triton.jit
def places(table, first, token, head, kv_heads: tl.constexpr, page_len: tl.constexpr, block: tl.constexpr):
    """Rows of `block` tokens from `first` (a multiple of `block`) in pages [.., kv_heads, page_len, ..]."""
    if page_len % block == 0:
        page = tl.load(table + first // page_len).to(tl.int64)
        place = first % page_len + tl.arange(0, block)
    else:
        page = tl.load(table + token // page_len).to(tl.int64)
        place = token % page_len
    return (page * kv_heads + head) * page_len + place


@triton.jit
def _byte(word):
    """The lowest byte as float32: the last digits of 2^23, and that subtracted. An instruction that converts integers
    runs at an eighth of the rate of others, and would be what attention over bytes takes."""
    return ((word & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def read_rows(pages, place, inside, head_dim: tl.constexpr, padded: tl.constexpr, plain: tl.constexpr):
    """Rows at `place` as they are stored: [block, padded], bytes as float32 0..255."""
    if plain:
        column = tl.arange(0, padded)
        mask = inside[:, None] & (column < head_dim)[None, :]
        rows = tl.load(pages + place[:, None] * head_dim + column[None, :], mask=mask, other=0.0)
    else:
        words: tl.constexpr = head_dim // 4
        column = tl.arange(0, padded // 4)
        mask = inside[:, None] & (column < words)[None, :]
        pointer = pages.to(tl.pointer_type(tl.int32)) + place[:, None] * words + column[None, :]
        word = tl.load(pointer, mask=mask, other=0)
        even = tl.join(_byte(word), _byte(word >> 16))
        odd = tl.join(_byte(word >> 8), _byte(word >> 24))
        rows = tl.join(even, odd).reshape(word.shape[0], padded)
    return rows


@triton.jit
def ask_for_rows(pages, place, head_dim: tl.constexpr):
    """Asks for the rows at `place` in the L2 cache; nothing waits for them."""
    per_line: tl.constexpr = 1024 // pages.dtype.element_ty.primitive_bitwidth
    lines: tl.constexpr = 1 if head_dim <= per_line else 2 if head_dim <= 2 * per_line else 4
    column = tl.minimum(tl.arange(0, lines) * per_line, head_dim - 1)
    prefetch(pages + place[:, None] * head_dim + column[None, :])


@triton.jit
def dequantized(rows, steps, place, inside):
    """Bytes [block, padded] as values, by the scale and zero point of each token."""
    scale = tl.load(steps + place * 2, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(steps + place * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    return (rows - 128.0) * scale[:, None] + zero[:, None]
