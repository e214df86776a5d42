"""What one forward step works on, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.reference import QUERY_BLOCK as QUERY_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B sequences with T scheduled tokens, packed one after the other; decode is a sequence with one token.

    token_ids    int [T]       those of -(row + 1) are `drawn` at that row, where it is given
    drawn        int64 [n]     tokens of the step before, on the device
    positions    int [T]       place of each token in its own sequence
    query_starts int32 [B+1]   cumulative: tokens of sequence b are query_starts[b] .. query_starts[b+1]
    context_lens int32 [B]     tokens of the sequence after this step, cached and new
    page_table   int32 [B, P]  pages of each sequence in order; entries beyond its context are not used
    slots        int [T]       page * page_len + offset where K and V of each token are written
    logits_at    int [R]       indices into T of the tokens whose logits are wanted
    rope_bases   float64 [B]   base of each sequence's rotary embedding, fixed at its start, where the model's base
                               depends on the length (see `rope_base`); None: as fits context_lens, for whole sequences
    decodes      int           the first so many sequences have one token each
    blocks       int32 [N, 2]  the others, cut into blocks of QUERY_BLOCK tokens: sequence and first token of each block
    decode_lens  int32 [decodes]  of a padded batch, which has room for more than there is: `context_lens` of the
                               sequences that decode, and 0 for what `blocks` names and for rows without a sequence.
                               A sequence without a context may have tokens, whose results mean nothing
    uneven       bool          contexts are of unequal lengths, which decode attention may be told of
    invariant    bool          attention by what `engine.kernels.invariant` says; `decodes` is 0, blocks are of all
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: Tensor
    context_lens: Tensor
    page_table: Tensor
    slots: Tensor
    logits_at: Tensor
    rope_bases: Tensor | None = None
    decodes: int = 0
    blocks: Tensor | None = None
    drawn: Tensor | None = None
    decode_lens: Tensor | None = None
    uneven: bool = False
    invariant: bool = False


def packed(sequences: Sequence[Sequence[int]] | Tensor, *, device: torch.device | str = "cpu") -> Batch:
    """Whole sequences from their first token, for a run without a cache; logits of every token are wanted."""
    rows = [torch.as_tensor(row, dtype=torch.int64, device=device) for row in sequences]
    lens = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = lens.cumsum(0)
    return Batch(
        token_ids=torch.cat(rows),
        positions=torch.cat([torch.arange(len(row), device=device) for row in rows]),
        query_starts=starts.to(device),
        context_lens=lens.to(device),
        page_table=torch.empty(len(rows), 0, dtype=torch.int32, device=device),
        slots=torch.empty(0, dtype=torch.int64, device=device),
        logits_at=torch.arange(int(starts[-1]), device=device),
    )
