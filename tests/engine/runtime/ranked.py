"""Small workspaces for tests of several ranks: grouped heads, biases, and a vocabulary that two do not divide."""

from pathlib import Path

import torch

from benchmarks.random_workspace import write_workspace
from engine.config import EngineConfig, ModelConfig, Recipe
from engine.storage.kv_scale_files import write_layer_scales
from engine.storage.workspace import WEIGHTS

CONFIG = ModelConfig(
    family="llama",
    vocab_size=299,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    norm_eps=1e-5,
    max_position_embeddings=64,
    qkv_bias=True,
    o_bias=True,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
OPTIONS = {"max_batch_size": 8, "num_tokens_per_iter": 40, "cache_max_entry_count": 200, "cache_block_seq_len": 8}


def recipe_of(weights: str, kv: str) -> Recipe:
    granularity = "channel" if kv == "kv8" else "tensor"
    return Recipe(weights=weights, kv=kv, group_size=32 if weights == "w4a16" else 0, kv_granularity=granularity)


def make_workspace(folder: Path, recipe: Recipe, *, config: ModelConfig = CONFIG, tp: int = 1) -> Path:
    """A workspace with random weights; every channel of an int8 cache has a scale and a zero point of its own."""
    write_workspace(folder, "tiny", config, recipe, tp=tp)
    if recipe.kv == "kv8":
        random = torch.Generator().manual_seed(1)
        for layer in range(config.num_layers):
            scales = torch.rand(config.num_kv_heads, config.head_dim, 4, generator=random) * 0.02 + 0.03
            scales[..., 1::2] -= 0.04  # zero points
            write_layer_scales(folder / WEIGHTS, layer, scales, granularity="channel", tp=tp)
    return folder


def options(**changed: object) -> EngineConfig:
    return EngineConfig(**{**OPTIONS, **changed})
