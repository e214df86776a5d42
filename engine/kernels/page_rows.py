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

# Of a word $4: its bytes $0 to $3, from the lowest on, as float32 of 1024 more.
NUMBERS = tl.constexpr(
    """{
    .reg .b32 low, high;
    .reg .b16 h<4>;
    prmt.b32 low, $4, 0x64646464, 0x4140;
    prmt.b32 high, $4, 0x64646464, 0x4342;
    mov.b32 {h0, h1}, low;
    mov.b32 {h2, h3}, high;
    cvt.f32.f16 $0, h0;
    cvt.f32.f16 $1, h1;
    cvt.f32.f16 $2, h2;
    cvt.f32.f16 $3, h3;
    }"""
)


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
def _halves(word):
    """The low bytes of both halves of a word as float32, each 1024 more: the last digits of 1024 in float16."""
    both = (word & 0x00FF00FF) | 0x64006400
    low = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _numbers(word, by_permutation: tl.constexpr):
    """The four bytes of a word from the lowest on, as `_halves` has them. By permutation that is half an instruction a
    byte before it is converted, which the compiler does not find by itself."""
    if by_permutation:
        first, second, third, fourth = tl.inline_asm_elementwise(
            NUMBERS,
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        first, third = _halves(word)
        second, fourth = _halves(word >> 8)
    return first, second, third, fourth


@triton.jit
def read_numbers(
    pages,
    place,
    inside,
    head_dim: tl.constexpr,
    padded: tl.constexpr,
    plain: tl.constexpr,
    by_permutation: tl.constexpr,
):
    """Rows at `place` [block, padded] in float32, bytes as 1024..1279; `by_permutation` on a GPU."""
    if plain:
        rows = read_rows(pages, place, inside, head_dim, padded, True).to(tl.float32)
    else:
        words: tl.constexpr = head_dim // 4
        column = tl.arange(0, padded // 4)
        mask = inside[:, None] & (column < words)[None, :]
        pointer = pages.to(tl.pointer_type(tl.int32)) + place[:, None] * words + column[None, :]
        word = tl.load(pointer, mask=mask, other=0)
        first, second, third, fourth = _numbers(word, by_permutation)
        rows = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(word.shape[0], padded)
    return rows


@triton.jit
def steps_at(steps, place, inside):
    """Scale and zero point of the tokens at `place` in float32, which lie in one word."""
    word = tl.load(steps.to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


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
