"""Steps with prompts, alone or beside sequences that decode, padded to a number of tokens that has a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.models.batch import QUERY_BLOCK, Batch
from engine.runtime.batch import Step, aligned, bases_of, fields_of
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import Sequence
from engine.runtime.staging import Staging

Integers = TypeVar("Integers", Tensor, NDArray[np.int32])
SIZES = (16, 32, 64, 128, 192, 256, *range(384, 1025, 128), *range(1280, 2049, 256))


def token_sizes(budget: int) -> list[int]:
    """Numbers of tokens that have a graph, in steps with at most `budget` tokens.

    A padded token costs what any token costs, about 20 us in a model of 7 billion, so steps are of 128 tokens from 256
    on, 2.5 ms at most. They end at 2048 tokens, which a device computes for as long as the host takes to launch the
    kernels one by one; memory for the activations of the largest is held for good (docs/decisions/0093).
    """
    most = min(budget, SIZES[-1])
    return [*(size for size in SIZES if size < most), most]


def blocks_in(size: int) -> int:
    """Blocks of QUERY_BLOCK tokens that a graph of `size` tokens computes attention for, filled or not: enough for 16
    prompts in any step and for prompts of 64 tokens in a full one. Each costs a few programs that end at once."""
    return max(1, min(size // 2, size // 64 + 16))


class MixedSteps:
    """Every step of a size has the same number of everything.

    Sequences: those of the plan, then such without tokens or context, of which the last but one always is one, and last
    of all one that has the padded tokens, and no context either. Blocks without work name the last but one. Attention
    of decoding sequences takes the first rows whatever they are, with a context of 0 for those that are none; what it
    leaves there the blocks' attention writes over. Padded rows of logits are those of the first token.
    """

    def __init__(self, staging: Staging, sizes: list[int], *, max_batch_size: int) -> None:
        self.sizes = sizes
        self._staging = staging
        self._most = max_batch_size

    def size_for(self, plan: Plan) -> int:
        """The size of the graph that computes a plan; 0 where none does."""
        sequences = plan.sequences
        if any(sequence.scored for sequence in sequences):
            return 0
        tokens = sum(sequence.scheduled for sequence in sequences)
        blocks = sum(-(-one.scheduled // QUERY_BLOCK) for one in sequences if one.scheduled > 1)
        large_enough = [size for size in self.sizes if size >= tokens]
        # Very many very short prompts are not worth a graph of many times their tokens.
        return next((size for size in large_enough[:2] if blocks_in(size) >= blocks), 0)

    def step_of(self, plan: Plan, rows: Mapping[Sequence, int], number: int, size: int) -> Step:
        """A plan as the graph of `size` reads it. `rows` is that of `build_batch`, `number` that of this step."""
        fields, decodes = fields_of(plan, page_len=self._staging.page_len, rows=rows)
        lengths = [room_for(size, self._most), fields.page_table.size]
        flat, table = self._staging.host(number, lengths)
        table[:] = fields.page_table.reshape(-1)
        header = self._layout(size, flat)
        total = int(fields.query_starts[-1])
        _fill(header["token_ids"], fields.token_ids, 0)
        _fill(header["positions"], fields.positions, 0)
        _fill(header["slots"], fields.slots, self._staging.spare_slot)
        _fill(header["query_starts"], fields.query_starts, total)
        header["query_starts"][-1] = size
        _fill(header["context_lens"], fields.context_lens, 0)
        _fill(header["decode_lens"], fields.context_lens[:decodes], 0)
        _fill(header["logits_at"], fields.logits_at, 0)
        _fill(header["ignoring"], [sequence.sampling.ignore_eos for sequence in plan.drawing], 0)
        blocks = header["blocks"].reshape(-1, 2)
        blocks[: len(fields.blocks)] = fields.blocks
        blocks[len(fields.blocks) :] = len(header["context_lens"]) - 2, 0
        return Step(
            integers=self._staging.integers(number, lengths),
            lengths=lengths,
            draws=len(plan.drawing),
            width=fields.page_table.shape[1],
            decodes=decodes,
            bases=bases_of(plan),
            graph=size,
            mixed=True,
        )

    def batch(self, size: int) -> Batch:
        """What the graph of `size` computes, wherever it was sent to."""
        header, staging = self._layout(size, self._staging.header), self._staging
        sequences = len(header["context_lens"])
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
            decodes=len(header["decode_lens"]),
            decode_lens=header["decode_lens"],
            blocks=header["blocks"].view(-1, 2),
        )

    def ignoring(self, size: int) -> Tensor:
        """Which rows of logits ignore end tokens: int32 [R]."""
        return self._layout(size, self._staging.header)["ignoring"]

    def _layout(self, size: int, flat: Integers) -> dict[str, Integers]:
        """The fields of a header."""
        fields, start = {}, 0
        for name, length in _lengths(size, self._most).items():
            fields[name] = flat[start : start + length]
            start += aligned(length)
        return fields


def room_for(size: int, max_batch_size: int) -> int:
    """Integers in the header of a step of `size` tokens."""
    return sum(map(aligned, _lengths(size, max_batch_size).values()))


def _lengths(size: int, max_batch_size: int) -> dict[str, int]:
    sequences = min(max_batch_size, size)  # each has at least one token
    return {
        "token_ids": size,
        "positions": size,
        "slots": size,
        "query_starts": sequences + 3,
        "context_lens": sequences + 2,
        "decode_lens": sequences,
        "logits_at": sequences,
        "ignoring": sequences,
        "blocks": 2 * blocks_in(size),
    }


def _fill(field: NDArray[np.int32], values: NDArray[np.int32] | list[bool], rest: int) -> None:
    field[: len(values)] = values
    field[len(values) :] = rest
