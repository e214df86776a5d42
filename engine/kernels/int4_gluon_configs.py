"""Configurations of `int4_gluon`: the default one, and those that tuning tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.kernels import split_tiles, splits
from engine.kernels.device import Device
from engine.kernels.int4_weights import Int4Weights
from engine.kernels.tuning import Config

MOST_ROWS = 4096


def default_config(m: int, weights: Int4Weights, device: Device) -> dict[str, Any]:
    """block_m rows of x and block_n of W a program; `splits` programs share a sum.

    turn: tiles of an iteration, at whose end all products are waited for; ahead: tiles of W in registers, a divisor of
    it; ring: tiles of x in shared memory, of which `wait` are waited for and `slot` given back at once. wait divides
    slot and ring, slot divides turn, and where it is less, the ring holds more than a slot. With `places` only the
    tiles that are left when the others have gone round so many programs a whole number of times are split. With
    "scaled": "sums" scales multiply sums of 128 products, which up to 32 rows takes fewer instructions than weights.
    """
    n, tiles = weights.out_features, weights.words.shape[1]
    if m <= 32:
        parts = splits.near(-(-n // 64), device.multiprocessors, (3 if m <= 16 else 2,))[0]
        block_m = 8 if m <= 8 else 16 if m <= 16 else 32
        return _config(block_m, 64, 4, (4, 4, 8, 4, 4), min(parts, max(1, tiles // 4)))
    if m <= 64:
        return _config(64, 64, 4, (4, 4, 4, 4, 1), splits.near(-(-n // 64), device.multiprocessors, (2,))[0])
    parts = splits.near(-(-n // 64) * -(-m // 128), device.multiprocessors, (1,))[0]
    return _config(128, 64, 4, (4, 4, 6, 4, 1), parts)


def _config(block_m: int, block_n: int, warps: int, loop: tuple[int, int, int, int, int], parts: int) -> dict[str, Any]:
    """`loop` is turn, ahead, ring, slot and wait."""
    turn, ahead, ring, slot, wait = loop
    return {
        "kernel": "gluon",
        "block_m": block_m,
        "block_n": block_n,
        "warps": warps,
        "turn": turn,
        "ahead": ahead,
        "ring": ring,
        "slot": slot,
        "wait": wait,
        "splits": parts,
    }


def candidates(m: int, n: int, k: int, device: Device) -> Sequence[Config]:
    """The configurations that tuning tries."""
    if m > MOST_ROWS:
        return []
    narrow: tuple[tuple[int, int, int, int, int], ...]
    wide: tuple[tuple[int, int, int, int, int], ...] = ()
    if m <= 32:
        block_m = max(8, 1 << (m - 1).bit_length())
        narrow = ((4, 4, 4, 4, 4), (4, 4, 8, 4, 4), (4, 4, 8, 2, 2), (4, 4, 8, 4, 1), (8, 8, 8, 8, 1), (8, 8, 8, 8, 8))
    elif m <= 64:
        block_m = 64
        narrow = ((4, 4, 4, 4, 1), (8, 8, 8, 8, 1), (8, 4, 8, 4, 1), (4, 4, 6, 2, 1), (4, 2, 4, 1, 1), (4, 2, 3, 1, 1))
        wide = ((8, 8, 8, 8, 1), (4, 4, 6, 2, 1), (4, 2, 4, 1, 1))
    else:
        block_m = 128
        narrow = ((4, 4, 6, 4, 1), (4, 4, 6, 2, 1), (8, 4, 6, 1, 1), (2, 2, 3, 2, 1), (4, 2, 3, 1, 1))
        wide = ((4, 2, 6, 2, 1), (4, 4, 6, 1, 1))
    shapes = [(block_m, 64, 4, loop) for loop in narrow] + [(block_m, 128, 8, loop) for loop in wide]
    if m > 64:
        shapes += [(128, 128, 4, loop) for loop in ((2, 2, 3, 2, 1), (4, 2, 3, 1, 1), (8, 2, 3, 1, 1))]
    if m > 128:
        shapes += [(256, 128, 8, loop) for loop in ((2, 2, 3, 2, 1), (4, 2, 3, 1, 1))]
    if m > 512:
        shapes = shapes[-2:]
    found: list[Config] = scaled_sums(m, n, k, device)
    for block_m, block_n, warps, loop in shapes:
        programs = -(-n // block_n) * -(-m // block_m)
        for parts in splits.near(programs, device.multiprocessors, (1, 2, 3, 4) if m <= 64 else (1, 2)):
            found.append(_config(block_m, block_n, warps, loop, parts))
    return found + tails(m, n, k, device)


def tails(m: int, n: int, k: int, device: Device) -> list[Config]:
    """Those that split the last tiles alone: `places` programs go together, 1 to 3 a multiprocessor."""
    shapes: tuple[tuple[int, int, int, tuple[int, int, int, int, int], tuple[int, ...]], ...]
    if m <= 32:
        block_m = max(8, 1 << (m - 1).bit_length())
        shapes = (
            (block_m, 64, 4, (8, 8, 8, 8, 1), (2, 3)),
            (block_m, 64, 4, (4, 4, 8, 4, 4), (1, 2, 3)),
            (block_m, 128, 8, (4, 4, 8, 4, 4), (1, 2)),
            (block_m, 128, 8, (4, 4, 8, 4, 1), (1, 2)),
        )
    elif m <= 64:
        shapes = (
            (64, 64, 4, (4, 4, 4, 4, 1), (2, 3)),
            (64, 128, 8, (4, 4, 4, 4, 1), (1, 2)),
            (64, 128, 8, (4, 4, 4, 2, 1), (1, 2)),
            (64, 128, 8, (4, 4, 6, 2, 1), (1, 2)),
            (64, 256, 8, (4, 2, 6, 2, 1), (1,)),
        )
    else:
        shapes = (
            (128, 128, 8, (4, 4, 6, 1, 1), (1,)),
            (128, 128, 8, (4, 4, 6, 2, 1), (1,)),
            (128, 128, 4, (4, 2, 3, 1, 1), (2,)),
            (128, 256, 8, (4, 2, 6, 1, 1), (1,)),
            (128, 256, 8, (4, 2, 6, 2, 1), (1,)),
        )
    if m > 128:
        shapes += ((256, 128, 8, (4, 2, 3, 1, 1), (1,)), (256, 128, 8, (2, 2, 3, 1, 1), (1,)))
    found: list[Config] = []
    for block_m, block_n, warps, loop, shares in shapes:
        tiles, turns = -(-n // block_n) * -(-m // block_m), -(-k // (128 * loop[0]))
        for share in shares:
            places = share * device.multiprocessors
            for parts in split_tiles.likely_parts(tiles, places, turns):
                found.append({**_config(block_m, block_n, warps, loop, parts), "places": places})
    return found


def scaled_sums(m: int, n: int, k: int, device: Device) -> list[Config]:
    """Those that multiply sums by the scales, of up to 32 rows, with the last tiles split and without. Two tiles of
    rows a warp have one address of x for both."""
    if m > 32:
        return []
    block_m = max(8, 1 << (m - 1).bit_length())
    if m <= 16:
        shapes = [(64, (4, 4, 8, 4, 4), (2, 3, 4)), (64, (8, 8, 16, 8, 8), (2, 3)), (64, (8, 8, 8, 8, 8), (2,))]
        shapes.append((128, (4, 4, 8, 4, 4), (2,)))
    else:
        shapes = [(64, (4, 4, 8, 4, 4), (2, 3)), (64, (4, 2, 8, 4, 4), (2, 3)), (64, (2, 2, 8, 2, 2), (3, 4))]
    found: list[Config] = []
    for block_n, loop, shares in shapes:
        tiles, turns = -(-n // block_n), -(-k // (128 * loop[0]))
        sizes = splits.near(tiles, device.multiprocessors, shares)
        configs = [_config(block_m, block_n, 4, loop, parts) for parts in sizes if parts <= turns]
        for share in shares:
            places = share * device.multiprocessors
            parts = split_tiles.likely_parts(tiles, places, turns)[:1]
            configs += [{**_config(block_m, block_n, 4, loop, part), "places": places} for part in parts]
        found += [{**config, "scaled": "sums"} for config in configs]
    return found
