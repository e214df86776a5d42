"""`sampling: reference`: the blocks that LMDeploy v0.1.0 draws from c4, ptb, wikitext2 and pileval, seed and all.

Its seed is always 0 and its generator Python's, but for pileval, whose rows are shuffled by NumPy's as `datasets` does.
Its blocks may overlap; with pileval there are as many as its documents give, not as many as were asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SEED = 0
LONGEST = 512
"""Documents of pileval with more tokens are passed over."""


def reference_blocks(
    name: str, rows: Sequence[str], encode: Callable[[str], list[int]], *, samples: int, sequence_length: int
) -> Tensor:
    """int32 [blocks, sequence_length] of the data set `name`, whose rows are all there, empty ones too.

    ValueError where the text is too short for one block: the reference fails there, or looks for one without end.
    """
    if name == "c4":
        blocks = _from_long_rows(rows, encode, samples, sequence_length)
    elif name == "pileval":
        blocks = _from_short_rows(rows, encode, samples, sequence_length)
    else:
        ids = encode("\n\n".join(rows))
        if len(ids) < sequence_length:
            raise _too_short(f"{name} has {len(ids)} tokens", sequence_length)
        generator = random.Random(SEED)
        starts = [generator.randint(0, len(ids) - sequence_length) for _ in range(samples)]
        blocks = [ids[start : start + sequence_length] for start in starts]
    return torch.tensor(blocks, dtype=torch.int32)


def _from_long_rows(
    rows: Sequence[str], encode: Callable[[str], list[int]], samples: int, length: int
) -> list[list[int]]:
    """A window of each row that is drawn and is long enough; shorter ones are drawn past."""
    generator = random.Random(SEED)
    long: dict[int, list[int]] = {}
    short: set[int] = set()
    blocks = []
    for _ in range(samples):
        while True:
            drawn = generator.randint(0, len(rows) - 1)
            if drawn not in long and drawn not in short:
                ids = encode(rows[drawn])
                if len(ids) >= length:
                    long[drawn] = ids
                else:
                    short.add(drawn)
                    if len(short) == len(rows):
                        raise _too_short(f"no row of c4 has as many tokens ({len(rows)} rows)", length)
            if drawn in long:
                break
        ids = long[drawn]
        start = generator.randint(0, len(ids) - length)
        blocks.append(ids[start : start + length])
    return blocks


def _from_short_rows(
    rows: Sequence[str], encode: Callable[[str], list[int]], samples: int, length: int
) -> list[list[int]]:
    """Shuffled rows of at most LONGEST tokens, `samples` of them joined and cut."""
    ids: list[int] = []
    taken = 0
    for drawn in np.random.default_rng(SEED).permutation(len(rows)):
        encoded = encode(rows[drawn].strip())
        if not encoded or len(encoded) > LONGEST:
            continue
        ids += encoded
        taken += 1
        if taken == samples:
            break
    count = len(ids) // length
    if not count:
        raise _too_short(f"{taken} rows of pileval with at most {LONGEST} tokens have {len(ids)} tokens", length)
    return [ids[number * length : (number + 1) * length] for number in range(count)]


def _too_short(found: str, length: int) -> ValueError:
    return ValueError(
        f"calibration.sampling=reference finds no block of calibration.sequence_length={length}: {found}. Lower it, "
        "give more text, or take another sampling."
    )
