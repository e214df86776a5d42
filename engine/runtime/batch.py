"""A plan as tensors: the one place where page numbers become cache positions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engine.models.batch import QUERY_BLOCK, Batch
from engine.runtime.scheduler import Plan
from engine.runtime.sequence import PENDING, Sequence


def token_ids(sequence: Sequence, rows: Mapping[Sequence, int]) -> list[int]:
    """The tokens that a sequence computes next. One that is still being drawn is -(row + 1), its row being that of the
    sequence in the step before."""
    ids = sequence.scheduled_tokens
    if ids[-1] == PENDING:
        ids[-1] = -(rows[sequence] + 1)
    return ids


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
        ids += token_ids(sequence, rows or {})
        start, end = int(starts[number]), int(starts[number + 1])
        if sequence.scored:
            wanted += range(start, end)
        elif sequence.draws:
            wanted.append(end - 1)
        if number >= decodes:
            blocks += [(number, first) for first in range(0, end - start, QUERY_BLOCK)]

    table = np.zeros((len(sequences), max(len(sequence.pages) for sequence in sequences)), dtype=np.int32)
    for number, sequence in enumerate(sequences):
        table[number, : len(sequence.pages)] = sequence.pages
    row = np.repeat(np.arange(len(sequences), dtype=np.int32), scheduled)
    positions = np.arange(total, dtype=np.int32) - starts[row] + cached[row]
    slots = table[row, positions // page_len] * page_len + positions % page_len
    fields = to_device([ids, positions, starts, cached + scheduled, slots, wanted, table, blocks], device)
    tokens, positions_, starts_, context_lens, slots_, logits_at, page_table, blocks_ = fields
    if drawn is not None and min(ids) < 0:
        tokens = torch.where(tokens < 0, drawn[(-1 - tokens).clamp(min=0)], tokens)
    bases = [sequence.rope_base for sequence in sequences if sequence.rope_base is not None]
    return Batch(
        token_ids=tokens,
        positions=positions_,
        query_starts=starts_,
        context_lens=context_lens,
        page_table=page_table.view(table.shape),
        slots=slots_,
        logits_at=logits_at,
        rope_bases=torch.tensor(bases, dtype=torch.float64).to(device) if bases else None,
        decodes=decodes,
        blocks=blocks_.view(-1, 2),
        invariant=invariant,
    )


def to_device(fields: list[object], device: torch.device) -> list[Tensor]:
    """Integers as int32 [n] each, moved by one copy from pinned memory."""
    arrays = [np.asarray(field, dtype=np.int32).reshape(-1) for field in fields]
    packed = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(torch.split(packed, [len(array) for array in arrays]))
