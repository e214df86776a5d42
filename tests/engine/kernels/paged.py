"""A paged cache with sequences in it, for tests of kernels over pages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import reference
from engine.models.batch import QUERY_BLOCK
from engine.models.cache import KVPages
from tests.engine.kernels.triton_device import DEVICE as DEVICE


def kv_pages(stored, num_pages, kv_heads, page_len, head_dim, dtype, generator):
    shape = (num_pages, kv_heads, page_len, head_dim)
    if stored == "plain":
        return KVPages(key=torch.zeros(shape, dtype=dtype), value=torch.zeros(shape, dtype=dtype))
    key, value = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
    if stored == "tokens":
        key_steps, value_steps = (torch.zeros(*shape[:3], 2, dtype=torch.float16) for _ in range(2))
        return KVPages(key=key, value=value, key_steps=key_steps, value_steps=value_steps)
    names = ("key_scale", "key_zero", "value_scale", "value_zero")
    made = {name: torch.randn(kv_heads, head_dim, generator=generator) * 0.3 for name in names}
    made |= {name: made[name].abs() / 20 + 0.005 for name in ("key_scale", "value_scale")}
    return KVPages(key=key, value=value, **made)


def moved(pages, device):
    tensors = {name: getattr(pages, name) for name in KVPages.__slots__}
    return KVPages(**{name: None if x is None else x.clone().to(device) for name, x in tensors.items()})


@dataclass
class Case:
    pages: KVPages
    query_starts: Tensor
    context_lens: Tensor
    page_table: Tensor
    slots: Tensor
    blocks: Tensor
    decodes: int
    uneven: bool = False


def paged_case(stored, kv_heads, head_dim, page_len, dtype, *, lens, new, seed=0):
    """Sequences of `lens` tokens whose last `new` are to be computed; what is before them lies in shuffled pages."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_len) for length in lens]
    order = iter(torch.randperm(sum(counts) + 1, generator=generator).tolist())
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([next(order) for _ in range(count)])
    pages = kv_pages(stored, sum(counts) + 1, kv_heads, page_len, head_dim, dtype, generator)
    slots = []
    for row, length, computed in zip(table, lens, new, strict=True):
        place = torch.arange(length)
        slot = row[place // page_len].long() * page_len + place % page_len
        old = length - computed
        if old:
            key, value = (torch.randn(old, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
            reference.write_kv(key, value, pages, slot[:old])
        slots.append(slot[old:])
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(new).cumsum(0)
    decodes = next((i for i, count in enumerate(new) if count > 1), len(new))
    blocks = [(i, first) for i, count in enumerate(new) if i >= decodes for first in range(0, count, QUERY_BLOCK)]
    return Case(
        pages=pages,
        query_starts=starts,
        context_lens=torch.tensor(lens, dtype=torch.int32),
        page_table=table,
        slots=torch.cat(slots),
        blocks=torch.tensor(blocks, dtype=torch.int32).view(-1, 2),
        decodes=decodes,
    )


def on_device(case):
    tensors = {
        name: getattr(case, name).to(DEVICE)
        for name in ("query_starts", "context_lens", "page_table", "slots", "blocks")
    }
    return Case(pages=moved(case.pages, DEVICE), decodes=case.decodes, **tensors)


def error(out, expected):
    """Relative, over the whole; NaN never passes."""
    out, expected = out.double().cpu(), expected.double().cpu()
    assert out.shape == expected.shape
    return float((out - expected).norm() / expected.norm())
