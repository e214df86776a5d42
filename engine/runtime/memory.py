"""How the memory of a device is shared out: weights, KV pages, and on a GPU what steps and graphs need beside them."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import psutil
import torch

from engine.config import EngineConfig, Sampling
from engine.models.batch import QUERY_BLOCK, Batch
from engine.models.cache import KVCache, KVScales, PerToken, page_bytes
from engine.models.decoder import Decoder
from engine.models.rope_scaling import is_dynamic
from engine.runtime.cache import page_count
from engine.runtime.graphs import Graphs, graph_sizes
from engine.runtime.sampler import Draws, sample

# What libraries take at their first use under load, and what fragments.
MARGIN = 256 << 20
# What the driver keeps of one graph of some 300 kernels: an estimate, on the safe side of those in use.
GRAPH = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes of a device: `weights` and `pages` as allocated, `workspace` as measured for a full step and the largest
    graphs (with MARGIN, and GRAPH for each of them), `free` what is left. On a CPU only `free` is known."""

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
    """Bytes that the largest step and the graphs take on a GPU, measured by running it and capturing the largest of
    both kinds, into whose memory the others fit, over one page."""
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
    wide = model.logits(batch, cache).float()
    options = [Sampling(temperature=1.0, top_p=0.9, min_p=0.1)] * len(wide)
    sample(wide, Draws(options=options, uniforms=[0.5] * len(wide), banned=([0], [0])))
    del wide
    torch.cuda.synchronize(model.device)
    stepped = torch.cuda.mem_get_info(model.device)[0]
    # Capturing empties torch's cache, so the step is measured before it, and the graphs from here on.
    torch.cuda.empty_cache()
    between = torch.cuda.mem_get_info(model.device)[0]
    drawn = torch.zeros(config.max_batch_size, dtype=torch.int64, device=model.device)
    sizes = graph_sizes(
        model, cache, max_batch_size=config.max_batch_size, num_tokens_per_iter=config.num_tokens_per_iter
    )
    graphs = Graphs(
        model,
        cache,
        drawn,
        eos_token_ids=(),
        max_batch_size=config.max_batch_size,
        session_len=session_len,
        sizes=sizes.largest,
    )
    torch.cuda.synchronize(model.device)
    used = before - stepped + between - torch.cuda.mem_get_info(model.device)[0]
    del batch, cache, drawn, graphs
    gc.collect()
    torch.cuda.empty_cache()
    stays = before - torch.cuda.mem_get_info(model.device)[0]  # is missing from the free memory already
    return max(used - stays, 0) + MARGIN + GRAPH * sizes.number


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
        invariant=model.deterministic,
    )


def num_pages_for(
    model: Decoder, config: EngineConfig, *, session_len: int, scales: KVScales | PerToken | None, room: int
) -> int:
    """Pages for the engine, from `room` bytes that are free for them. On a CPU a share of the memory ends where
    max_batch_size full sessions fit: the rest serves better as the system's page cache."""
    page_len = config.cache_block_seq_len
    full = config.max_batch_size * -(-session_len // page_len)
    return page_count(
        config.cache_max_entry_count,
        page_bytes=page_bytes(
            model.config,
            page_len=page_len,
            dtype=model.dtype,
            quantized=scales is not None,
            per_token=isinstance(scales, PerToken),
        ),
        free_bytes=room,
        page_len=page_len,
        session_len=session_len,
        most=full if model.device.type == "cpu" else None,
    )


def room_for_pages(model: Decoder, *, reserved: int) -> int:
    """Bytes that are free beside `reserved` ones: with several ranks the least that one of them has, so that all have
    equally many pages. Ranks on a CPU share it."""
    free, ranks = free_memory(model.device), model.ranks
    if ranks is not None and model.device.type == "cpu":
        free //= ranks.size
    room = max(free - reserved, 0)
    return room if ranks is None else ranks.least(room, model.device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device right now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def allocated(device: torch.device) -> int:
    """Bytes that torch holds in tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
