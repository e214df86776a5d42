"""What makes the logits of a token the same bits whatever is computed beside it: linear layers over tiles of a fixed
number of rows, and attention over key blocks that begin at fixed places.

Libraries and kernels choose the order of a sum by the shape of what they are given, so a row of a product can differ
in its last bits between a step of one token and a step of fifty. With one shape there is one order. Everything else in
a decoder works on each row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels.reference import PagedQueries, Pages, gather_pages

QUERIES, KEYS = 16, 64


def tile_rows(device: torch.device) -> int:
    """Rows of a tile: on a GPU as many as cost hardly more than one, on a CPU a compromise of one and many."""
    return 64 if device.type == "cuda" else 16


def tiles(x: Tensor, rows: int) -> Iterator[Tensor]:
    """x [T, ...] in pieces [rows, ...], the last one filled up with zeros."""
    for piece in torch.split(x, rows):
        missing = rows - len(piece)
        yield torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])]) if missing else piece


def paged_attention(
    query: Tensor, pages: Pages, batch: PagedQueries, scale: float, window: int | None = None
) -> Tensor:
    """`reference.paged_attention`, block by block of keys with an online softmax (Milakov and Gimelshein 2018): a block
    that a query does not see changes none of its bits. The kernel of `prefill_attention` has the same property."""
    starts, lens = batch.query_starts.tolist(), batch.context_lens.tolist()
    out = torch.empty_like(query)
    for b, length in enumerate(lens):
        first, last = starts[b], starts[b + 1]
        key, value = (
            torch.nn.functional.pad(x[0], (0, 0, 0, -length % KEYS))
            for x in gather_pages(pages, batch.page_table[b : b + 1], length)
        )
        place = length - (last - first)
        for piece in torch.split(query[first:last], QUERIES):
            (tile,) = tiles(piece, QUERIES)
            attended = _attend_tile(tile.float() * scale, key, value, place, window)
            out[first : first + len(piece)] = attended[: len(piece)].to(out.dtype)
            first, place = first + len(piece), place + len(piece)
    return out


def _attend_tile(query: Tensor, key: Tensor, value: Tensor, place: int, window: int | None) -> Tensor:
    """Queries [QUERIES, heads, D] of the tokens from `place` on over key, value [kv_heads, whole blocks, D]."""
    count, heads, head_dim = query.shape
    kv_heads = len(key)
    grouped = query.view(count, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    position = (place + torch.arange(count, device=query.device)).repeat_interleave(heads // kv_heads)[:, None]
    best = grouped.new_full((*grouped.shape[:2], 1), -torch.inf)
    weight, total = torch.zeros_like(best), torch.zeros_like(grouped)
    begin = 0 if window is None else max(0, place - window + 1) // KEYS * KEYS
    for start in range(begin, min(place + count, key.shape[1]), KEYS):
        block_key, block_value = (x[:, start : start + KEYS].contiguous() for x in (key, value))
        token = start + torch.arange(KEYS, device=query.device)
        hidden = token > position
        if window is not None:
            hidden |= token <= position - window
        scores = (grouped @ block_key.transpose(1, 2)).masked_fill_(hidden, -torch.inf)
        highest = torch.maximum(best, scores.amax(-1, keepdim=True))
        shift = highest.masked_fill(highest.isinf(), 0)
        shares, keep = (scores - shift).exp(), (best - shift).exp()
        weight = weight * keep + shares.sum(-1, keepdim=True)
        total = total * keep + shares @ block_value
        best = highest
    attended = (total / weight).view(kv_heads, count, -1, head_dim)
    return attended.transpose(0, 1).reshape(count, heads, head_dim)
