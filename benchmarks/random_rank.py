"""A tensor-parallel rank of a model with random weights, which it makes itself: `python -m benchmarks.random_rank`."""

from __future__ import annotations

import sys

import torch

from benchmarks.random_weights import RandomWeights, random_kv_scales
from benchmarks.shapes import shape
from engine.config import EngineConfig, ModelConfig, Recipe
from engine.models.cache import KVScales
from engine.models.decoder import Decoder
from engine.models.ranks import Ranks
from engine.runtime.capability import computing_dtype
from engine.runtime.channel import Channel, Message
from engine.runtime.rank_process import follow, run
from engine.runtime.share import Share, rank_device
from engine.storage.rank_cuts import rank_config
from engine.storage.rank_weights import RankWeights, rank_scales


def random_share(model: ModelConfig, recipe: Recipe, config: EngineConfig, rank: int, *, seed: int) -> Share:
    """What one of `config.tp` ranks has of a model with random weights; all of it, where there is one."""
    tp, dtype = config.tp, getattr(torch, computing_dtype(model, config))
    device = rank_device(config.device, rank, tp)
    if tp > 1 and device.startswith("cuda"):
        torch.cuda.set_device(device)
    weights, scales = RandomWeights(model, recipe, device=device, seed=seed), random_kv_scales(model, recipe)
    if tp == 1:
        decoder = Decoder(model, weights, device=device, dtype=dtype, deterministic=config.deterministic)
        return Share(model=decoder, kv_scales=scales)
    decoder = Decoder(
        rank_config(model, recipe, tp),
        RankWeights(weights, model, recipe, rank=rank, tp=tp),
        device=device,
        dtype=dtype,
        ranks=Ranks(rank, tp),
        deterministic=config.deterministic,
    )
    return Share(model=decoder, kv_scales=rank_scales(scales, rank, tp) if isinstance(scales, KVScales) else scales)


def work(task: Message, channel: Channel) -> None:
    config, recipe = EngineConfig(**task["config"]), Recipe(**task["recipe"])
    share = random_share(shape(task["shape"]), recipe, config, task["rank"], seed=task["seed"])
    follow(task, channel, share, config)


if __name__ == "__main__":
    sys.exit(run(work))
