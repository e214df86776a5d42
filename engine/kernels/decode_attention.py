"""Attention of one new token a sequence over its pages, in Triton: how often a context is split, and the launch."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels import tuning
from engine.kernels.decode_kernels import decode_group, decode_one
from engine.kernels.dependent_launch import options
from engine.kernels.device import INTERPRETER, Device, facts
from engine.kernels.page_rows import TOKENS, pointers, storage_of
from engine.kernels.reference import Pages
from engine.kernels.rope_write_kv import rope_write_kv
from engine.kernels.splits import TILES, buffers
from engine.kernels.tuning import Config

LOG2E = 1.4426950408889634
# Programs per multiprocessor that keep the memory busy; a batch with fewer is split further.
WAVES = 2
MOST_SPLITS = 32


def splits_for(batch: int, kv_heads: int, device: torch.device) -> int:
    """Into how many parts the context of each sequence is cut: a function of the batch's size, not of its lengths, so
    that a captured graph stays right as the sequences grow."""
    wanted = WAVES * facts(device).multiprocessors // max(batch * kv_heads, 1)
    return max(1, min(1 << (wanted.bit_length() - 1) if wanted else 1, MOST_SPLITS))


def config_for(
    device: Device, kind: str, stored: str, kv_heads: int, head_dim: int, batch: int, *, uneven: bool = False
) -> Config:
    """How a kernel (`one` query head a KV head, or a `group`) goes through a context: `block` tokens at once, in
    `stages` of which all but one are on their way, by `warps`; from the table of the device, else what is good on one
    that is unknown. `form` "fragments" is `decode_fragments` or `decode_group_fragments`, where it can do that; else
    the rest is what is meant, if `stages` are among it. `parts` into which that form cuts every context are in place of
    `splits_for`: the more programs there are, the more evenly they end. That costs where contexts are of one length, so
    a table may have other rows for `uneven` ones."""
    op = f"decode_{kind}_{stored}"
    found = tuning.lookup(op, device.name, kv_heads, head_dim, batch, uneven=uneven)
    return _default(kind, stored) if found is None else found


def minds_lengths(pages: Pages, heads: int, batch: int) -> bool:
    """Whether the table has a row of its own for contexts that are `uneven`."""
    _, kv_heads, _, head_dim = pages.key.shape
    op = f"decode_{'one' if heads == kv_heads else 'group'}_{storage_of(pages)}"
    size = facts(pages.key.device).name, kv_heads, head_dim, batch
    return tuning.lookup(op, *size, uneven=True) is not tuning.lookup(op, *size)


def _default(kind: str, stored: str) -> Config:
    one = kind == "one"
    return {"block": 32 if one else 64, "stages": 3, "warps": 4 if one or stored == TOKENS.value else 2}


def candidates(kind: str) -> list[Config]:
    """The configurations that tuning tries: block, stages, warps; and those by matrix instructions."""
    one = ((32, 3, 4), (32, 3, 2), (32, 2, 4), (32, 4, 4), (16, 3, 1), (16, 3, 2), (16, 4, 4), (64, 2, 4), (64, 3, 8))
    group = ((64, 3, 2), (64, 2, 2), (64, 3, 4), (64, 2, 4), (128, 2, 4), (32, 3, 1), (32, 3, 2), (32, 4, 2))
    tried = one if kind == "one" else group
    found: list[Config] = [{"block": block, "stages": stages, "warps": warps} for block, stages, warps in tried]
    fragments = _fragments(kind)
    return found + (fragments.candidates() if fragments else [])


@functools.cache
def _fragments(kind: str) -> ModuleType | None:
    """`decode_fragments` or `decode_group_fragments`; None where this Triton's Gluon, which is experimental, is another
    one."""
    try:
        return importlib.import_module(f"engine.kernels.decode_{'' if kind == 'one' else 'group_'}fragments")
    except ImportError:
        return None


def decode_attention(
    query: Tensor,
    pages: Pages,
    context_lens: Tensor,
    page_table: Tensor,
    scale: float,
    window: int | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
    *,
    uneven: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v for one token a sequence: query [B, heads, head_dim] -> the same shape.

    The last token of `context_lens` [B] is the query's own, whose K and V are in the pages already. A sequence of 0
    tokens gets zeros. `config` overrides the table of the device; see `config_for`, which is also told of `uneven`
    contexts.
    """
    out = torch.empty_like(query) if out is None else out
    config = config or _config(out, pages, uneven=uneven)
    _launch(query, pages, context_lens, page_table, scale, window, splits, out, config)
    return out


def rope_decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_scale: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    pages: Pages,
    slots: Tensor,
    context_lens: Tensor,
    page_table: Tensor,
    heads: int,
    scale: float,
    window: int | None = None,
    splits: int | None = None,
    config: Config | None = None,
    *,
    uneven: bool = False,
) -> Tensor:
    """`rope_write_kv` of one token a sequence, and the attention of its queries: [B, heads, head_dim]. A sequence of 0
    tokens gets zeros; what is in its slot afterwards is not said. `config` and `uneven` as in `decode_attention`."""
    out = torch.empty(len(qkv), heads, pages.key.shape[3], dtype=qkv.dtype, device=qkv.device)
    config = config or _config(out, pages, uneven=uneven)
    if _by_fragments(config, out, pages, page_table, window, _parts(splits, config, out, pages)):
        query = rope_write_kv(qkv, cos, sin, query_scale, head_norms, eps, pages, slots, heads)
        return decode_attention(query, pages, context_lens, page_table, scale, None, splits, out, config)
    query_norm, key_norm = head_norms or (qkv, qkv)
    _launch(
        qkv,
        pages,
        context_lens,
        page_table,
        scale,
        window,
        splits,
        out,
        config,
        cos=cos,
        sin=sin,
        query_scale=qkv if query_scale is None else query_scale,
        query_norm=query_norm,
        key_norm=key_norm,
        slots=slots,
        query_stride=qkv.stride(0),
        eps=eps,
        turns=True,
        norms=head_norms is not None,
        scaled=query_scale is not None,
    )
    return out


def _kind(out: Tensor, pages: Pages) -> str:
    return "one" if out.shape[1] == pages.key.shape[1] else "group"


def _splits(asked: int | None, batch: int, pages: Pages, device: torch.device) -> int:
    kv_heads = pages.key.shape[1]
    return (asked or splits_for(batch, kv_heads, device)) if batch * kv_heads <= TILES else 1


def _parts(asked: int | None, config: Config, query: Tensor, pages: Pages) -> int:
    """Into how many parts the form by matrix instructions cuts each context."""
    return _splits(asked or config.get("parts"), len(query), pages, query.device)


def _config(out: Tensor, pages: Pages, *, uneven: bool = False) -> Config:
    _, kv_heads, _, head_dim = pages.key.shape
    kind, stored = _kind(out, pages), storage_of(pages)
    return config_for(facts(out.device), kind, stored, kv_heads, head_dim, len(out), uneven=uneven)


def _by_fragments(
    config: Config, query: Tensor, pages: Pages, page_table: Tensor, window: int | None, parts: int
) -> ModuleType | None:
    """What has the form that is asked for, if it can do this attention."""
    if "form" not in config or window:
        return None
    fragments = _fragments(_kind(query, pages))
    most = -(-page_table.shape[1] * pages.key.shape[2] // parts)
    return fragments if fragments and fragments.runs(config, query, pages, most, facts(query.device)) else None


def _launch(
    query: Tensor,
    pages: Pages,
    context_lens: Tensor,
    page_table: Tensor,
    scale: float,
    window: int | None,
    splits: int | None,
    out: Tensor,
    config: Config,
    **turning: Any,
) -> None:
    batch, heads, head_dim = out.shape
    _, kv_heads, page_len, _ = pages.key.shape
    group = heads // kv_heads
    if not batch:
        return
    kind, stored, device = _kind(out, pages), storage_of(pages), facts(query.device)
    parts = _parts(splits, config, query, pages)
    fragments = None if turning else _by_fragments(config, query, pages, page_table, window, parts)
    if fragments:
        fragments.run(query, pages, context_lens, page_table, scale * LOG2E, out, config, parts)
        return
    splits = _splits(splits, batch, pages, query.device)
    if "stages" not in config:  # a row of the form that cannot do this, and none of the one that can
        config = _default(kind, stored)
    partial, sums, arrivals = out, out, out
    if splits > 1:
        _, arrivals = buffers(query.device)
        partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, splits, dtype=torch.float32, device=query.device)
    padded = triton.next_power_of_2(head_dim)
    one_row = group == 1
    kernel = decode_one if one_row else decode_group
    rows = {} if one_row else {"rows": max(triton.next_power_of_2(group), 16)}
    unused: dict[str, Any] = dict.fromkeys(("cos", "sin", "query_scale", "query_norm", "key_norm", "slots"), query)
    unused |= {"query_stride": 0, "eps": 0.0, "turns": False, "norms": False, "scaled": False}
    kernel[(splits, kv_heads, batch)](
        query,
        *pointers(pages, query),
        context_lens,
        page_table,
        out,
        partial,
        sums,
        arrivals,
        table_stride=page_table.stride(0),
        factor=scale * LOG2E,
        window=window or 0,
        kv_heads=kv_heads,
        group=group,
        page_len=page_len,
        head_dim=head_dim,
        padded=padded if one_row else max(padded, 16),
        block=config["block"],
        stored=stored,
        splits=splits,
        stages=1 if device == INTERPRETER else config["stages"],
        num_warps=config["warps"],
        **rows,
        **(unused | turning),
        **options(device),
    )
