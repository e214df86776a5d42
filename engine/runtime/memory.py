"""What an engine needs of a GPU's memory beside weights and pages, and what it took in the end."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.models.batch import QUERY_BLOCK, Batch
from engine.models.cache import KVCache, KVScales, PerToken
from engine.models.decoder import Decoder
from engine.models.rope_scaling import is_dynamic
from engine.runtime.graphs import DecodeGraphs

# What libraries take at their first use under load, and what fragments.
MARGIN = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes of a device: `weights` and `pages` as allocated, `workspace` as measured for a full step and the graphs,
    `free` what is left."""

    weights: int
    pages: int
    workspace: int
    free: int

    def __str__(self) -> str:
        parts = {"weights": self.weights, "KV pages": self.pages, "workspace": self.workspace, "free": self.free}
        return ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())


@torch.inference_mode()
def working_memory(
    model: Decoder, config: EngineConfig, *, session_len: int, scales: KVScales | PerToken | None
) -> int:
    """Bytes that the largest step and the graphs take on a GPU, measured by running both over one page."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(model.device)[0]
    cache = KVCache(
        model.config,
        num_pages=1,
        page_len=config.cache_block_seq_len,
        device=model.device,
        dtype=model.dtype,
        scales=scales,
    )
    batch = _full_step(model, config, session_len=session_len)
    model.logits(batch, cache).float().argmax(-1)
    drawn = torch.zeros(config.max_batch_size, dtype=torch.int64, device=model.device)
    graphs = DecodeGraphs(
        model,
        cache,
        drawn,
        eos_token_ids=(),
        max_batch_size=config.max_batch_size,
        session_len=session_len,
        sizes=[config.max_batch_size],
    )
    torch.cuda.synchronize(model.device)
    used = before - torch.cuda.mem_get_info(model.device)[0]
    del batch, cache, drawn, graphs
    gc.collect()
    torch.cuda.empty_cache()
    return used + MARGIN


def _full_step(model: Decoder, config: EngineConfig, *, session_len: int) -> Batch:
    """As many prompt tokens as a step takes, all written to the first slot."""
    device, total = model.device, config.num_tokens_per_iter
    most = min(session_len, total)
    lens = [most] * (total // most) + ([total % most] if total % most else [])
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(lens).cumsum(0)
    blocks = [(number, first) for number, length in enumerate(lens) for first in range(0, length, QUERY_BLOCK)]
    zeros = torch.zeros(total, dtype=torch.int32, device=device)
    width = -(-session_len // config.cache_block_seq_len)
    bases = torch.full((len(lens),), model.config.rope_theta, dtype=torch.float64, device=device)
    return Batch(
        token_ids=zeros,
        positions=torch.cat([torch.arange(length, dtype=torch.int32) for length in lens]).to(device),
        query_starts=starts.to(device),
        context_lens=starts.diff().to(device),
        page_table=torch.zeros(len(lens), width, dtype=torch.int32, device=device),
        slots=zeros,
        logits_at=torch.arange(min(config.max_batch_size, total), device=device),
        rope_bases=bases if is_dynamic(model.config) else None,
        blocks=torch.tensor(blocks, dtype=torch.int32).to(device),
    )
