"""From weights to a runner: pages in the memory that is left, and graphs. All ranks do it, in the same order."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

from engine.config import EngineConfig
from engine.models.cache import KVCache, KVScales, PerToken
from engine.models.decoder import Decoder
from engine.runtime.heap import keep_freed_memory
from engine.runtime.memory import MemoryReport, allocated, free_memory, num_pages_for, room_for_pages, working_memory
from engine.runtime.rank_processes import RankProcesses
from engine.runtime.runner import Runner


class Prepared(NamedTuple):
    """A runner, the pages that its cache can give out, and where the memory went."""

    runner: Runner
    num_pages: int
    memory: MemoryReport


def prepare(
    model: Decoder,
    config: EngineConfig,
    *,
    session_len: int,
    kv_scales: KVScales | PerToken | None,
    eos_token_ids: tuple[int, ...],
    others: RankProcesses | None = None,
) -> Prepared:
    """Make what steps run on; `config` has nothing left open. ValueError if the cache cannot hold one session."""
    on_gpu = model.device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()
    together = nullcontext if others is None else others.together
    with together():
        reserved = working_memory(model, config, session_len=session_len, scales=kv_scales) if on_gpu else 0
        room = room_for_pages(model, reserved=reserved)
    loaded = allocated(model.device)
    num_pages = num_pages_for(model, config, session_len=session_len, scales=kv_scales, room=room)
    with together():
        cache = KVCache(
            model.config,
            num_pages=num_pages + on_gpu,  # padded rows of a graph write to a page of their own
            page_len=config.cache_block_seq_len,
            device=model.device,
            dtype=model.dtype,
            scales=kv_scales,
        )
        held = allocated(model.device) - loaded
        runner = Runner(
            model,
            cache,
            eos_token_ids=eos_token_ids,
            max_batch_size=config.max_batch_size,
            num_tokens_per_iter=config.num_tokens_per_iter,
            session_len=session_len,
            others=others,
        )
    memory = MemoryReport(weights=loaded, pages=held, workspace=reserved, free=free_memory(model.device))
    return Prepared(runner, num_pages, memory)
