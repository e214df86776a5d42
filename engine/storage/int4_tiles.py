"""int4 codes between the words of Hugging Face checkpoints and TurboMind's tiles, whole arrays at a time.

All of these keep eight codes in a 32-bit word, so that each is an order of index bits. With k the input, n the output
and n0 the lowest bit of n, the bits 2, 1, 0 of a code's place (its nibble) in a word are

    AWQ words [K, M/8]            n0, n2, n1; the others say which word
    packed words [M, K/8]         k2, k1, k0
    tiles [K/32, M/32, 128]       k0, k3, n3; the word within its tile is n2 n1 n0 k2 k1 k4 n4

From one to another three bits of the nibble change places with bits of the word's number, one after the other: each
time, half of every word of one half of the words is exchanged with the other half of a word of the other half. A
transposition of whole words ends it. No code is ever taken out of its word. Words of tiles go by twos, as int64, with
n4 the upper half. On a CPU numpy does it at twice the speed of torch, which unpacks what lies on a GPU. Little-endian
hosts only.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.storage.rank_cuts import TILE

# On a CPU; on a GPU it is a tensor, with the same operators.
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LANES = 4
# The lower one of every two fields of so many bits.
LOWER = {4: 0x0F0F0F0F0F0F0F0F, 8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF}
# Axes of the words on their way (see `_wide`), in the order of a tile: k tile, n tile, n2, n1, n0, k2 k1, k4.
OF_TILES = (1, 6, 3, 0, 5, 4, 2)
OF_ALTERNATING_TILES = (1, 6, 3, 5, 0, 4, 2)


def pack_tiles(words: Tensor) -> Tensor:
    """AWQ words int32 [K, M/8] -> tiles int32 [K/32, M/32, 128]; K and M are multiples of 32."""
    source = _wide(words)
    wide = np.empty((2, *source.shape[:-1], source.shape[-1] // 2), np.int64)
    _exchange(source[..., ::2], source[..., 1::2], 32, into=wide)  # n4 into the upper half; the first axis is n3
    _exchange(wide[0], wide[1], 4)  # n1 for n3
    _exchange(wide[:, :, :, 0], wide[:, :, :, 1], 8)  # n2 for k3
    _exchange(wide[:, :, :, :, :, 0], wide[:, :, :, :, :, 1], 16)  # n0 for k0
    return _as_tiles(wide.transpose(OF_TILES))


def unpack_tiles(tiles: Tensor) -> Tensor:
    """Undo `pack_tiles`."""
    wide = _from_tiles(tiles, OF_TILES)
    _exchange(wide[:, :, :, :, :, 0], wide[:, :, :, :, :, 1], 16)
    _exchange(wide[:, :, :, 0], wide[:, :, :, 1], 8)
    _exchange(wide[0], wide[1], 4)
    size: Any = (*wide.shape[1:], 2)
    there = torch.empty(size, dtype=torch.int64, device=tiles.device)
    words: Any = there.numpy() if _on_host(tiles) else there
    _exchange(wide[0], wide[1], 32, into=(words[..., 0], words[..., 1]))
    return _as_words(words)


def pack_alternating_tiles(even: Tensor, odd: Tensor) -> Tensor:
    """The tiles of the matrix whose columns 2j and 2j + 1 are columns j of `even` and `odd`, AWQ words [K, M/16].

    They may be given in runs, [K, runs, M/16/runs]; a run has a multiple of 16 columns.
    """
    wide = np.empty((2, even.shape[0] // TILE, 2, 2, LANES, 2, even[0].numel() // 2), np.int64)
    for half, words in zip(wide, (even, odd), strict=True):
        source = _wide(words)
        half.reshape(source.shape)[...] = source
    # The first axis is n0; within `even` and `odd` n1, n3 and n2 are where the others are in a whole matrix.
    _exchange(wide[:, :, :, :, :, 0], wide[:, :, :, :, :, 1], 16)  # n1 for k0
    _exchange(wide[:, :, :, 0], wide[:, :, :, 1], 8)  # n3 for k3
    _exchange(wide[:, :, :, 0], wide[:, :, :, 1], 4)  # n2 for that n3
    return _as_tiles(wide.transpose(OF_ALTERNATING_TILES))


def unpack_alternating_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `pack_alternating_tiles`: even and odd columns, AWQ words [K, M/16] each."""
    wide = _from_tiles(tiles, OF_ALTERNATING_TILES)
    _exchange(wide[:, :, :, 0], wide[:, :, :, 1], 4)
    _exchange(wide[:, :, :, 0], wide[:, :, :, 1], 8)
    _exchange(wide[:, :, :, :, :, 0], wide[:, :, :, :, :, 1], 16)
    return _as_words(wide[0]), _as_words(wide[1])


def awq_from_packed(words: Tensor) -> Tensor:
    """Packed words int32 [M, K/8] -> AWQ words int32 [K, M/8]; K and M are multiples of 8."""
    outputs, eighths = words.shape
    bits = words.numpy().reshape(outputs // 8, 2, 2, 2, eighths).copy()  # n2, n1, n0 in the middle
    _exchange(bits[:, :, :, 0], bits[:, :, :, 1], 16)  # k2 for n0
    _exchange(bits[:, 0], bits[:, 1], 8)  # k1 for n2
    _exchange(bits[:, :, 0], bits[:, :, 1], 4)  # k0 for n1
    return torch.from_numpy(np.ascontiguousarray(bits.transpose(4, 3, 1, 2, 0)).reshape(eighths * 8, outputs // 8))


def packed_from_awq(words: Tensor) -> Tensor:
    """Undo `awq_from_packed`."""
    inputs, eighths = words.shape
    turned = words.numpy().reshape(inputs // 8, 2, 2, 2, eighths).transpose(4, 2, 3, 1, 0)
    bits = np.array(turned, order="C")
    _exchange(bits[:, :, 0], bits[:, :, 1], 4)
    _exchange(bits[:, 0], bits[:, 1], 8)
    _exchange(bits[:, :, :, 0], bits[:, :, :, 1], 16)
    return torch.from_numpy(bits.reshape(eighths * 8, inputs // 8))


def _wide(words: Tensor) -> Array:
    """AWQ words [K, ...] as int64 [k tile, k4, k3, k2 k1, k0, ...]; the upper half is n3, n4 of alternating columns."""
    wide = words.numpy().view(np.int64)
    return wide.reshape(wide.shape[0] // TILE, 2, 2, LANES, 2, *wide.shape[1:])


def _as_words(wide: Array) -> Tensor:
    """Undo `_wide`, for one run."""
    inputs = wide.shape[0] * TILE
    if isinstance(wide, Tensor):
        return wide.reshape(inputs, -1).view(torch.int32)
    return torch.from_numpy(wide.reshape(inputs, -1).view(np.int32))


def _as_tiles(wide: Array) -> Tensor:
    k_tiles, n_tiles = wide.shape[:2]
    return torch.from_numpy(np.ascontiguousarray(wide).view(np.int32).reshape(k_tiles, n_tiles, 4 * TILE))


def _from_tiles(tiles: Tensor, axes: tuple[int, ...]) -> Array:
    """Undo `_as_tiles` of a transposition by `axes`: a copy."""
    if not _on_host(tiles):
        shape = (*tiles.shape[:2], 2, 2, 2, LANES, 2)
        found: Any = tiles.contiguous().view(torch.int64).view(shape).permute(*np.argsort(axes).tolist())
        return found.clone(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]
    wide = tiles.numpy().view(np.int64).reshape(*tiles.shape[:2], 2, 2, 2, LANES, 2)
    return np.array(wide.transpose(np.argsort(axes)), order="C")


def _exchange(first: Array, second: Array, bits: int, *, into: Any = None) -> None:
    """Exchange upper fields of `bits` bits of `first` with lower ones of `second`, in place or `into` two others."""
    one, other = (first, second) if into is None else into
    moved = first >> bits
    moved ^= second
    moved &= LOWER[bits] & (1 << 8 * first.itemsize) - 1
    xor: Any = torch.bitwise_xor if isinstance(first, Tensor) else np.bitwise_xor
    xor(second, moved, out=other)
    moved <<= bits
    xor(first, moved, out=one)


def _on_host(words: Tensor) -> bool:
    return not words.is_cuda
