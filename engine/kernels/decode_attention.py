"""Attention of one new token a sequence over its pages, in Triton: how often a context is split, and the launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels import tuning
from engine.kernels.decode_kernels import decode_group, decode_one
from engine.kernels.decode_walk import walk_one
from engine.kernels.decode_walk_group import walk_group
from engine.kernels.dependent_launch import options
from engine.kernels.device import INTERPRETER, Device, facts
from engine.kernels.page_rows import TOKENS, pointers, storage_of
from engine.kernels.reference import Pages
from engine.kernels.splits import TILES, buffers
from engine.kernels.tuning import Config

LOG2E = 1.4426950408889634
# Programs per multiprocessor that keep the memory busy; a batch with fewer is split further.
WAVES = 2
MOST_SPLITS = 32
# Sequences whose lengths a program of the walking form reads: one kernel for all batches up to the first.
LEAST_WALKED, MOST_WALKED = 256, 1024


def splits_for(batch: int, kv_heads: int, device: torch.device) -> int:
    """Into how many parts the context of each sequence is cut: a function of the batch's size, not of its lengths, so
    that a captured graph stays right as the sequences grow."""
    wanted = WAVES * facts(device).multiprocessors // max(batch * kv_heads, 1)
    return max(1, min(1 << (wanted.bit_length() - 1) if wanted else 1, MOST_SPLITS))


def config_for(device: Device, kind: str, stored: str, kv_heads: int, head_dim: int, batch: int) -> Config:
    """How a kernel (`one` query head a KV head, or a `group`) goes through a context: `block` tokens at once, in
    `stages` of which all but one are on their way, by `warps`; from the table of the device, else what is good on one
    that is unknown. With `form: walk` it is that of `decode_walk`, by `each` programs a multiprocessor, with at most
    `registers` a thread; with `turns` as well it takes the place of `rope_write_kv`."""
    found = tuning.lookup(f"decode_{kind}_{stored}", device.name, kv_heads, head_dim, batch)
    if found is None:
        one = kind == "one"
        warps = 4 if one or stored == TOKENS.value else 2
        found = {"block": 32 if one else 64, "stages": 3, "warps": warps}
    return found


def candidates(kind: str) -> list[Config]:
    """The configurations of the form that splits contexts which tuning tries: block, stages, warps."""
    one = ((32, 3, 4), (32, 3, 2), (32, 2, 4), (32, 4, 4), (16, 3, 1), (16, 3, 2), (16, 4, 4), (64, 2, 4), (64, 3, 8))
    group = ((64, 3, 2), (64, 2, 2), (64, 3, 4), (64, 2, 4), (128, 2, 4), (32, 3, 1), (32, 3, 2), (32, 4, 2))
    tried = one if kind == "one" else group
    return [{"block": block, "stages": stages, "warps": warps} for block, stages, warps in tried]


def walking(kind: str, stored: str) -> list[Config]:
    """The walking form's candidates. `each` is what registers leave room for, and twice and four times that: programs
    that are fewer begin and end less often, more of them even out what one is slower than another."""
    tried: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {
        ("one", "plain"): ((32, 3, 4, 128, 4), (16, 3, 2, 128, 8)),
        ("one", "channels"): ((16, 3, 1, 128, 16), (32, 3, 2, 128, 8)),
        ("one", "tokens"): ((16, 3, 1, 128, 16), (32, 3, 2, 128, 8)),
        ("group", "plain"): ((64, 3, 4, 168, 3), (32, 3, 2, 255, 4)),
        ("group", "channels"): ((64, 3, 4, 168, 3), (64, 3, 2, 255, 4)),
        ("group", "tokens"): ((64, 3, 4, 168, 3), (32, 3, 2, 255, 4)),
    }
    return [
        {"form": "walk", "block": block, "stages": stages, "warps": warps, "registers": registers, "each": each * more}
        for block, stages, warps, registers, each in tried[kind, stored]
        for more in (1, 2, 4)
    ]


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
) -> Tensor:
    """softmax(q k^T * scale) v for one token a sequence: query [B, heads, head_dim] -> the same shape.

    The last token of `context_lens` [B] is the query's own, whose K and V are in the pages already. A sequence of 0
    tokens gets zeros. `config` overrides the table of the device; see `config_for`.
    """
    out = torch.empty_like(query) if out is None else out
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
) -> Tensor:
    """`rope_write_kv` of one token a sequence, and the attention of its queries: [B, heads, head_dim]. A sequence of 0
    tokens gets zeros and writes nothing. `config` is that of `decode_attention`."""
    out = torch.empty(len(qkv), heads, pages.key.shape[3], dtype=qkv.dtype, device=qkv.device)
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


def turns_inside(batch: int, heads: int, pages: Pages, device: torch.device) -> bool:
    """Whether `rope_decode_attention` is the way to compute a step of `batch` tokens: where contexts are split, which
    is where a launch costs as much as its work, and where the table has the walking form with `turns`."""
    _, kv_heads, _, head_dim = pages.key.shape
    if splits_for(batch, kv_heads, device) > 1:
        return True
    kind = "one" if heads == kv_heads else "group"
    config = config_for(facts(device), kind, storage_of(pages), kv_heads, head_dim, batch)
    return walks(config, batch) and bool(config.get("turns"))


def walks(config: Config, batch: int) -> bool:
    """Whether a configuration means the walking form, and it can take the batch."""
    return config.get("form") == "walk" and batch <= MOST_WALKED


def _launch(
    query: Tensor,
    pages: Pages,
    context_lens: Tensor,
    page_table: Tensor,
    scale: float,
    window: int | None,
    splits: int | None,
    out: Tensor,
    config: Config | None = None,
    **turning: Any,
) -> None:
    batch, heads, head_dim = out.shape
    _, kv_heads, page_len, _ = pages.key.shape
    if not batch:
        return
    kind = "one" if heads == kv_heads else "group"
    stored, device = storage_of(pages), facts(query.device)
    config = config or config_for(device, kind, stored, kv_heads, head_dim, batch)
    # What both forms are given.
    given: dict[str, Any] = dict.fromkeys(("cos", "sin", "query_scale", "query_norm", "key_norm", "slots"), query)
    given |= {"query_stride": 0, "eps": 0.0, "turns": False, "norms": False, "scaled": False}
    given |= turning
    given |= {
        "table_stride": page_table.stride(0),
        "factor": scale * LOG2E,
        "window": window or 0,
        "kv_heads": kv_heads,
        "page_len": page_len,
        "head_dim": head_dim,
        "block": config["block"],
        "stored": stored,
        "stages": 1 if device == INTERPRETER else config["stages"],
        "num_warps": config["warps"],
    }
    given |= options(device)
    if device != INTERPRETER and "registers" in config:
        given["maxnreg"] = config["registers"]
    inputs = (query, *pointers(pages, query), context_lens, page_table, out)
    if walks(config, batch):
        _walk(inputs, config, device, given)
    else:
        _split(inputs, heads // kv_heads, splits or splits_for(batch, kv_heads, query.device), given)


def _split(inputs: tuple[Tensor, ...], group: int, splits: int, given: dict[str, Any]) -> None:
    """The form whose programs take a part of a context each."""
    out = inputs[-1]
    batch, heads, head_dim = out.shape
    splits = splits if batch * given["kv_heads"] <= TILES else 1
    partial, sums, arrivals = out, out, out
    if splits > 1:
        _, arrivals = buffers(out.device)
        partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=out.device)
        sums = torch.empty(batch, heads, splits, dtype=torch.float32, device=out.device)
    padded = triton.next_power_of_2(head_dim)
    kernel = decode_one if group == 1 else decode_group
    rows = {} if group == 1 else {"rows": max(triton.next_power_of_2(group), 16)}
    kernel[(splits, given["kv_heads"], batch)](
        *inputs,
        partial,
        sums,
        arrivals,
        group=group,
        padded=padded if group == 1 else max(padded, 16),
        splits=splits,
        **rows,
        **given,
    )


def _walk(inputs: tuple[Tensor, ...], config: Config, device: Device, given: dict[str, Any]) -> None:
    """The form whose programs share the blocks of all contexts: `each` programs a multiprocessor."""
    pages, out = inputs[1], inputs[-1]
    batch, heads, head_dim = out.shape
    group = heads // given["kv_heads"]
    programs = device.multiprocessors * config["each"]
    _, arrivals = buffers(out.device)
    padded = triton.next_power_of_2(head_dim)
    if group > 1:
        sizes = {"padded": max(padded, 16), "rows": max(triton.next_power_of_2(group), 16), "group": group}
    else:
        # One row of a tile's registers is 16 bytes a thread; the tokens below each other there share their sums.
        rows = max(1, config["warps"] * 32 * 16 // (padded * pages.element_size()))
        sizes = {"padded": padded, "rows": min(rows, given["block"])}
    kernel = walk_one if group == 1 else walk_group
    kernel[(programs,)](
        *inputs,
        torch.empty(programs, 2, group, head_dim, dtype=torch.float32, device=out.device),
        torch.empty(programs, 2, group, dtype=torch.float32, device=out.device),
        arrivals,
        batch=batch,
        most=max(triton.next_power_of_2(batch), LEAST_WALKED),
        **sizes,
        **given,
    )
