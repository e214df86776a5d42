"""Token blocks: documents become ids, and a fixed number of equally long, not overlapping blocks is drawn from them."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice

import torch
from torch import Tensor

# Documents are encoded until there are this many times the tokens asked for, so that blocks have some choice.
SURPLUS = 4
SAMPLINGS = ("random", "first", "stratified")


def token_blocks(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    samples: int,
    sequence_length: int,
    sampling: str,
    seed: int = 0,
    part: str | None = None,
) -> Tensor:
    """int32 [samples, sequence_length]: documents one after the other as ids, cut into blocks, `samples` of them kept.

    `first` takes documents and blocks in their order. `random` shuffles the documents and draws blocks by `seed`
    (Python's generator, the same on every machine), and keeps those in the order of the text. `stratified` has no
    chance in it: see `stratified_blocks`. No token is used twice.
    Raises ValueError where the text is too short, naming what can be lowered: fewer samples are never taken in silence.
    `part` is the key of the part of a mixture that the documents are.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"calibration.sampling={sampling} must be {', '.join(SAMPLINGS[:-1])} or {SAMPLINGS[-1]}.")
    if sampling == "stratified":
        return stratified_blocks(documents, encode, samples=samples, sequence_length=sequence_length, part=part)
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
        raise _too_short(len(ids), samples=samples, sequence_length=sequence_length, part=part)
    chosen = sorted(generator.sample(range(available), samples)) if sampling == "random" else list(range(samples))
    blocks = torch.tensor(ids[: available * sequence_length], dtype=torch.int32).view(available, sequence_length)
    return blocks[chosen].contiguous()


def stratified_blocks(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    samples: int,
    sequence_length: int,
    part: str | None = None,
) -> Tensor:
    """int32 [samples, sequence_length]: every length of document has the share of blocks that it has of the text.

    Documents stand by their number of characters, equally long ones in the order of the text, and are cut into
    `samples` strata of equally many characters; a cut within a document falls at the same fraction of its tokens,
    rounded down. A block is the first `sequence_length` tokens of its stratum, so only what is needed is encoded.
    ValueError where a stratum has fewer, naming what can be lowered.
    """
    order = sorted(documents, key=len)
    starts = [0, *accumulate(map(len, order))]
    total = starts.pop()
    encoded = lru_cache(maxsize=2)(lambda number: encode(order[number]))

    def cut(number: int, stratum: int) -> int:
        """The token of a document at which a stratum begins."""
        begun = max(0, stratum * total - starts[number] * samples)
        ids = encoded(number)
        return min(len(ids), begun * len(ids) // (samples * len(order[number])))

    def tokens(stratum: int) -> Iterator[int]:
        first = bisect_right(starts, stratum * total // samples) - 1
        for number in range(first, len(order)):
            if starts[number] * samples >= (stratum + 1) * total:
                return
            yield from encoded(number)[cut(number, stratum) : cut(number, stratum + 1)]

    blocks = [list(islice(tokens(stratum), sequence_length)) for stratum in range(samples)]
    if any(len(block) < sequence_length for block in blocks):
        lengths = [sum(1 for _ in tokens(stratum)) for stratum in range(samples)]
        raise _too_short(
            sum(lengths), samples=samples, sequence_length=sequence_length, part=part, stratum=min(lengths)
        )
    return torch.tensor(blocks, dtype=torch.int32)


def _too_short(
    num_tokens: int, *, samples: int, sequence_length: int, part: str | None, stratum: int | None = None
) -> ValueError:
    """What to say of a text of `num_tokens`; `stratum` are the tokens of the shortest, where there are strata."""
    available = num_tokens // sequence_length
    asked = f"calibration.samples={samples}" if part is None else f"{samples} of calibration.samples are asked of it"
    if stratum is None:
        found = f"{available} blocks of calibration.sequence_length={sequence_length}"
        length = num_tokens // samples
    else:
        found = (
            f"{stratum} in the shortest of {samples} equal parts, below calibration.sequence_length={sequence_length}"
        )
        length = stratum
    lower = [f"calibration.samples to {available}"] if available and part is None and stratum is None else []
    lower += [f"{part}.weight"] if part else []
    lower += [f"calibration.sequence_length to {length}"] if length >= 2 else []
    return ValueError(
        f"{part or 'The calibration text'} has {num_tokens} tokens: {found}, but {asked}. "
        + (f"Lower {' or '.join(lower)}, or give a longer text." if lower else "Give a longer text.")
    )
