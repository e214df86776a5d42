"""A plan as numbers and as tensors: the one place where page numbers become cache positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.batch import QUERY_BLOCK, Batch
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import PENDING, Sequence

# Fields begin at multiples of 16 bytes: of pointers that do not, Triton compiles kernels of their own.
ALIGNED = 4


def aligned(length: int) -> int:
    """How many integers a field of so many takes."""
    return -(-length // ALIGNED) * ALIGNED


def token_ids(sequence: Sequence, rows: Mapping[Sequence, int]) -> list[int]:
    """The tokens that a sequence computes next. One that is still being drawn is -(row + 1), its row being that of the
    sequence in the step before."""
    ids = sequence.scheduled_tokens
    if ids[-1] == PENDING:
        ids[-1] = -(rows[sequence] + 1)
    return ids


class Size(NamedTuple):
    """Which graph: the number of tokens that it computes, and the sequences that it has room for; 0 of those where each
    token is one of a sequence that decodes. `uneven` is that of `Batch`."""

    tokens: int
    room: int = 0
    uneven: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What ranks are sent of a plan: its integers in one piece, int32 [n], of which `lengths` says the fields.

    `draws` sequences draw. `width` is that of the page table; `decodes` and `bases` are those of `Batch`, no bases
    where the model has one. `graph` is that which computes the step, None where none does, and `sampled` says that the
    tokens of a graph's step are not just the likeliest ones. `table` says which page table a graph's step has: no table
    is sent, its length is 0, where that lies on the device already.
    """

    integers: NDArray[np.int32]
    lengths: list[int]
    draws: int
    width: int
    decodes: int
    bases: list[float]
    graph: Size | None = None
    sampled: bool = False
    table: int = 0

    def message(self) -> dict[str, Any]:
        """The step as msgpack has it; `of_message` reads it."""
        return {**asdict(replace(self, integers=_NONE)), "integers": self.integers.tobytes()}

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> Step:
        fields = {
            "integers": np.frombuffer(message["integers"], dtype=np.int32),
            "lengths": list(message["lengths"]),  # lists come as tuples
            "bases": list(message["bases"]),
            "graph": Size(*message["graph"]) if message["graph"] else None,
        }
        return cls(**{**message, **fields})


_NONE = np.empty(0, dtype=np.int32)


class Fields(NamedTuple):
    """The integers of a plan as in `Batch`, without padding: int32 [n], the page table [B, P], blocks [N, 2]."""

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    query_starts: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    slots: NDArray[np.int32]
    logits_at: NDArray[np.int32]
    page_table: NDArray[np.int32]
    blocks: NDArray[np.int32]


def build_batch(
    plan: Plan,
    *,
    page_len: int,
    device: torch.device,
    rows: Mapping[Sequence, int] | None = None,
    drawn: Tensor | None = None,
    invariant: bool = False,
) -> Batch:
    """The batch that computes a plan. Logits are wanted for the last token of a sequence that draws, and for every
    token of one that is scored.

    All integers go to the device in one piece. `drawn` are the tokens of the step before, on the device, and `rows`
    where each of its sequences stands there: what the host has not read yet is filled in from them. `invariant` is the
    batch's own.
    """
    step = step_of(plan, page_len=page_len, rows=rows or {}, invariant=invariant)
    return batch_of(step, device=device, drawn=drawn, invariant=invariant)


def step_of(plan: Plan, *, page_len: int, rows: Mapping[Sequence, int], invariant: bool = False) -> Step:
    """The first half of `build_batch`."""
    fields, decodes = fields_of(plan, page_len=page_len, rows=rows, invariant=invariant)
    integers = np.zeros(sum(aligned(field.size) for field in fields), dtype=np.int32)
    start = 0
    for field in fields:
        integers[start : start + field.size] = field.reshape(-1)
        start += aligned(field.size)
    return Step(
        integers=integers,
        lengths=[field.size for field in fields],
        draws=len(plan.drawing),
        width=fields.page_table.shape[1],
        decodes=decodes,
        bases=bases_of(plan),
    )


def bases_of(plan: Plan) -> list[float]:
    return [sequence.rope_base for sequence in plan.sequences if sequence.rope_base is not None]


def fields_of(
    plan: Plan, *, page_len: int, rows: Mapping[Sequence, int], invariant: bool = False
) -> tuple[Fields, int]:
    """The integers of a plan, and how many sequences at its beginning have one token each (see `Batch.decodes`)."""
    sequences = plan.sequences
    scheduled = np.array([sequence.scheduled for sequence in sequences], dtype=np.int32)
    cached = np.array([sequence.cached for sequence in sequences], dtype=np.int32)
    starts = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(scheduled, out=starts[1:])
    total = int(starts[-1])
    decodes = 0 if invariant else next((i for i, count in enumerate(scheduled) if count > 1), len(sequences))
    ids: list[int] = []
    wanted: list[int] = []
    blocks: list[tuple[int, int]] = []
    for number, sequence in enumerate(sequences):
        ids += token_ids(sequence, rows)
        start, end = int(starts[number]), int(starts[number + 1])
        if sequence.scored:
            wanted += range(start, end)
        elif sequence.draws:
            wanted.append(end - 1)
        if number >= decodes:
            blocks += [(number, first) for first in range(0, end - start, QUERY_BLOCK)]

    table = np.zeros((len(sequences), max((len(sequence.pages) for sequence in sequences), default=0)), dtype=np.int32)
    for number, sequence in enumerate(sequences):
        table[number, : len(sequence.pages)] = sequence.pages
    row = np.repeat(np.arange(len(sequences), dtype=np.int32), scheduled)
    positions = np.arange(total, dtype=np.int32) - starts[row] + cached[row]
    slots = table[row, positions // page_len] * page_len + positions % page_len
    fields = Fields(
        token_ids=np.array(ids, dtype=np.int32),
        positions=positions,
        query_starts=starts,
        context_lens=cached + scheduled,
        slots=slots,
        logits_at=np.array(wanted, dtype=np.int32),
        page_table=table,
        blocks=np.array(blocks, dtype=np.int32).reshape(-1, 2),
    )
    return fields, decodes


def batch_of(step: Step, *, device: torch.device, drawn: Tensor | None, invariant: bool = False) -> Batch:
    """The second half of `build_batch`."""
    tokens, positions, starts, context_lens, slots, logits_at, page_table, blocks = to_device(step, device)
    return Batch(
        token_ids=tokens,
        positions=positions,
        query_starts=starts,
        context_lens=context_lens,
        page_table=page_table.view(-1, step.width),
        slots=slots,
        logits_at=logits_at,
        rope_bases=torch.tensor(step.bases, dtype=torch.float64).to(device) if step.bases else None,
        decodes=step.decodes,
        blocks=blocks.view(-1, 2),
        invariant=invariant,
        drawn=drawn,
    )


def to_device(step: Step, device: torch.device) -> list[Tensor]:
    """The fields of a step as int32 [n] each, moved by one copy from pinned memory."""
    packed = torch.from_numpy(step.integers if step.integers.flags.writeable else step.integers.copy())
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    pieces = torch.split(packed, [aligned(length) for length in step.lengths])
    return [piece[:length] for piece, length in zip(pieces, step.lengths, strict=True)]
