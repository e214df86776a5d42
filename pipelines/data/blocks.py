"""Token blocks: documents become ids, and a fixed number of equally long, not overlapping blocks is drawn from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Documents are encoded until there are this many times the tokens asked for, so that blocks have some choice.
SURPLUS = 4


def token_blocks(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    samples: int,
    sequence_length: int,
    sampling: str,
    seed: int,
) -> Tensor:
    """int32 [samples, sequence_length]: documents one after the other as ids, cut into blocks, `samples` of them kept.

    `first` takes documents and blocks in their order. `random` shuffles the documents and draws blocks by `seed`
    (Python's generator, the same on every machine), and keeps those in the order of the text. No token is used twice.
    Raises ValueError where the text is too short, naming what can be lowered: fewer samples are never taken in silence.
    """
    if sampling not in ("random", "first"):
        raise ValueError(f"calibration.sampling={sampling} must be random or first.")
    generator = random.Random(seed)
    order = list(documents)
    wanted = samples * sequence_length
    if sampling == "random":
        generator.shuffle(order)
        wanted *= SURPLUS
    ids: list[int] = []
    for document in order:
        ids += encode(document)
        if len(ids) >= wanted:
            break
    available = len(ids) // sequence_length
    if available < samples:
        lower = [f"calibration.samples to {available}"] if available else []
        lower += [f"calibration.sequence_length to {len(ids) // samples}"] if len(ids) >= 2 * samples else []
        raise ValueError(
            f"The calibration text has {len(ids)} tokens: {available} blocks of calibration.sequence_length="
            f"{sequence_length}, but calibration.samples={samples}. "
            + (f"Lower {' or '.join(lower)}, or give a longer text." if lower else "Give a longer text.")
        )
    chosen = sorted(generator.sample(range(available), samples)) if sampling == "random" else list(range(samples))
    blocks = torch.tensor(ids[: available * sequence_length], dtype=torch.int32).view(available, sequence_length)
    return blocks[chosen].contiguous()
