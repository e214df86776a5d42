"""A plan as tensors: the one place where page numbers become cache positions."""

from __future__ import annotations

import torch

from engine.models.batch import Batch
from engine.runtime.scheduler import Plan


def build_batch(plan: Plan, *, page_len: int, device: torch.device) -> Batch:
    """The batch that computes a plan. Logits are wanted for the last token of a sequence that draws, and for every
    token of one that is scored."""
    sequences = plan.sequences
    starts = [0]
    wanted: list[int] = []
    token_ids: list[int] = []
    for sequence in sequences:
        start, end = starts[-1], starts[-1] + sequence.scheduled
        starts.append(end)
        token_ids += sequence.scheduled_tokens
        if sequence.scored:
            wanted += range(start, end)
        elif sequence.draws:
            wanted.append(end - 1)

    bases = [sequence.rope_base for sequence in sequences if sequence.rope_base is not None]
    cached = torch.tensor([sequence.cached for sequence in sequences])
    scheduled = torch.tensor([sequence.scheduled for sequence in sequences])
    width = max(len(sequence.pages) for sequence in sequences)
    page_table = torch.tensor([sequence.pages + [0] * (width - len(sequence.pages)) for sequence in sequences])
    row = torch.repeat_interleave(torch.arange(len(sequences)), scheduled)
    positions = torch.arange(starts[-1]) - torch.tensor(starts)[row] + cached[row]
    slots = page_table[row, positions // page_len] * page_len + positions % page_len
    return Batch(
        token_ids=torch.tensor(token_ids).to(device),
        positions=positions.to(device),
        query_starts=torch.tensor(starts, dtype=torch.int32).to(device),
        context_lens=(cached + scheduled).to(device, torch.int32),
        page_table=page_table.to(device, torch.int32),
        slots=slots.to(device),
        logits_at=torch.tensor(wanted, dtype=torch.int64).to(device),
        rope_bases=torch.tensor(bases, dtype=torch.float64).to(device) if bases else None,
    )
