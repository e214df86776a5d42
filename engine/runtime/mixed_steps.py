"""Steps with prompts, alone or beside sequences that decode, padded to a number of tokens that has a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.models.batch import QUERY_BLOCK, Batch
from engine.runtime.batch import Size, Step, aligned, bases_of, fields_of
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import Sequence
from engine.runtime.staging import Staging

Integers = TypeVar("Integers", Tensor, NDArray[np.int32])
TOKENS = (16, 32, 64, 128, 192, 256, *range(384, 1025, 128), *range(1280, 2049, 256))
# A graph for so few sequences beside the one for the largest batch, where that is at least twice as many; and up to so
# many tokens, beyond which the difference is lost in the whole.
FEW, LITTLE = 64, 1024


def mixed_sizes(*, budget: int, max_batch_size: int) -> list[Size]:
    """The graphs for steps with at most `budget` tokens, in order.

    A padded token costs what any token costs, about 20 us in a model of 7 billion, so steps are of 128 tokens from 256
    on, 2.5 ms at most. They end at 2048 tokens, which a device computes for as long as the host takes to launch the
    kernels one by one; memory for the activations of the largest is held for good. A padded sequence costs a row of
    logits and 32 programs of decode attention a layer, which end at once: 1.5 ms for 256 of them
    (docs/decisions/0093).
    """
    most = min(budget, TOKENS[-1])
    sizes = []
    for tokens in [*(size for size in TOKENS if size < most), most]:
        room = min(max_batch_size, tokens)  # each sequence has at least one token
        if room >= 2 * FEW and tokens <= LITTLE:
            sizes.append(Size(tokens, FEW))
        sizes.append(Size(tokens, room))
    return sizes


def blocks_in(tokens: int) -> int:
    """Blocks of QUERY_BLOCK tokens that a graph of so many tokens computes attention for, filled or not: enough for
    16 prompts in any step, and for prompts of 64 tokens in a full one. One costs as many programs as there are heads,
    which end at once."""
    return max(1, min(tokens // 2, tokens // 64 + 16))


class MixedSteps:
    """Every step of a size has the same number of everything.

    Sequences: those of the plan, then such without tokens or context, of which the last but one always is one, and last
    of all one that has the padded tokens, and no context either. Blocks without work name the last but one. Attention
    of decoding sequences takes the first rows whatever they are, with a context of 0 for those that are none; what it
    leaves there the blocks' attention writes over. Padded rows of logits are those of the first token.
    """

    def __init__(self, staging: Staging, sizes: list[Size]) -> None:
        self.sizes = sizes
        self._staging = staging

    def size_for(self, plan: Plan) -> Size | None:
        """The graph that computes a plan; None where none does."""
        sequences = plan.sequences
        if any(sequence.scored for sequence in sequences):
            return None
        tokens = sum(sequence.scheduled for sequence in sequences)
        blocks = sum(-(-one.scheduled // QUERY_BLOCK) for one in sequences if one.scheduled > 1)
        large_enough = [size for size in self.sizes if size.tokens >= tokens and size.room >= len(sequences)]
        # Very many very short prompts are not worth a graph of many times their tokens.
        return next((size for size in large_enough[:3] if blocks_in(size.tokens) >= blocks), None)

    def step_of(self, plan: Plan, rows: Mapping[Sequence, int], number: int, size: Size) -> Step:
        """A plan as the graph of `size` reads it. `rows` is that of `build_batch`, `number` that of this step."""
        fields, decodes = fields_of(plan, page_len=self._staging.page_len, rows=rows)
        lengths = [room_for(size), fields.page_table.size]
        flat, table = self._staging.host(number, lengths)
        table[:] = fields.page_table.reshape(-1)
        header = _layout(size, flat)
        total = int(fields.query_starts[-1])
        _fill(header["token_ids"], fields.token_ids, 0)
        _fill(header["positions"], fields.positions, 0)
        _fill(header["slots"], fields.slots, self._staging.spare_slot)
        _fill(header["query_starts"], fields.query_starts, total)
        header["query_starts"][-1] = size.tokens
        _fill(header["context_lens"], fields.context_lens, 0)
        _fill(header["decode_lens"], fields.context_lens[:decodes], 0)
        _fill(header["logits_at"], fields.logits_at, 0)
        _fill(header["ignoring"], [sequence.sampling.ignore_eos for sequence in plan.drawing], 0)
        blocks = header["blocks"].reshape(-1, 2)
        blocks[: len(fields.blocks)] = fields.blocks
        blocks[len(fields.blocks) :] = size.room, 0
        return Step(
            integers=self._staging.integers(number, lengths),
            lengths=lengths,
            draws=len(plan.drawing),
            width=fields.page_table.shape[1],
            decodes=decodes,
            bases=bases_of(plan),
            graph=size,
        )

    def batch(self, size: Size) -> Batch:
        """What the graph of `size` computes, wherever it was sent to."""
        header, staging, sequences = _layout(size, self._staging.header), self._staging, size.room + 2
        return Batch(
            token_ids=header["token_ids"],
            drawn=staging.drawn,
            positions=header["positions"],
            query_starts=header["query_starts"],
            context_lens=header["context_lens"],
            page_table=staging.page_table[:sequences],
            slots=header["slots"],
            logits_at=header["logits_at"],
            rope_bases=None if staging.rope_bases is None else staging.rope_bases[:sequences],
            decodes=size.room,
            decode_lens=header["decode_lens"],
            uneven=True,
            blocks=header["blocks"].view(-1, 2),
        )

    def ignoring(self, size: Size) -> Tensor:
        """Which rows of logits ignore end tokens: int32 [R]."""
        return _layout(size, self._staging.header)["ignoring"]


def room_for(size: Size) -> int:
    """Integers in the header of a step."""
    return sum(map(aligned, _lengths(size).values()))


def _layout(size: Size, flat: Integers) -> dict[str, Integers]:
    """The fields of a header."""
    fields, start = {}, 0
    for name, length in _lengths(size).items():
        fields[name] = flat[start : start + length]
        start += aligned(length)
    return fields


def _lengths(size: Size) -> dict[str, int]:
    tokens, sequences, _ = size
    return {
        "token_ids": tokens,
        "positions": tokens,
        "slots": tokens,
        "query_starts": sequences + 3,
        "context_lens": sequences + 2,
        "decode_lens": sequences,
        "logits_at": sequences,
        "ignoring": sequences,
        "blocks": 2 * blocks_in(tokens),
    }


def _fill(field: NDArray[np.int32], values: NDArray[np.int32] | list[bool], rest: int) -> None:
    field[: len(values)] = values
    field[len(values) :] = rest
