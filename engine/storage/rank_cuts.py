"""How a layer is dealt to tensor-parallel ranks: which runs of rows and columns, and how much is filled with zeros.

Attention is dealt by whole heads. The FFN is dealt in equal runs of whole groups (and tiles, for int4; of w8a8 whole
blocks that are rotated): where its width
is no multiple, the last ranks are filled up with zero columns in gate and up and zero rows in down. Everything follows
from the model, the group size and tp, so that no file has to say it. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, lcm

from engine.config import ModelConfig, Recipe
from engine.models import names

TILE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCut:
    """What one rank holds of the modules that share a matrix, along the dimension that is cut.

    Rank r has the runs [r * piece, (r + 1) * piece) of each module, short or empty ones filled with zeros, and in a
    file zeros after them up to `stored`. `group_size` is that of these files, 0 without groups: rows of `o_proj` that
    end within a group have smaller ones, with the group's scale and zero point repeated.
    """

    pieces: tuple[int, ...]
    stored: int
    group_size: int


def rank_cut(config: ModelConfig, recipe: Recipe, modules: tuple[str, ...], tp: int) -> RankCut:
    """The cut of the linears of a layer that lie in one matrix; the counts of heads must be multiples of tp."""
    int4 = recipe.weights == "w4a16"
    group_size = recipe.group_size if int4 else 0
    if modules == (names.OUTPUT,):
        rows = names.linear_shape(config, names.OUTPUT)[1] // tp
        group_size = gcd(group_size, rows) if int4 else 0
        return RankCut(pieces=(rows,), stored=_up(rows, lcm(group_size, TILE)) if int4 else rows, group_size=group_size)
    if set(modules) <= {*names.GATE_UP, names.DOWN}:
        share = ffn_share(config, recipe, tp)
        return RankCut(pieces=(share,) * len(modules), stored=share * len(modules), group_size=group_size)
    pieces = tuple(names.linear_shape(config, module)[0] // tp for module in modules)
    return RankCut(pieces=pieces, stored=_up(sum(pieces), TILE) if int4 else sum(pieces), group_size=group_size)


def ffn_share(config: ModelConfig, recipe: Recipe, tp: int) -> int:
    """FFN features of one rank, padding included: the smallest whole number of groups and tiles, or of rotated blocks,
    that is enough."""
    unit = lcm(recipe.group_size, TILE) if recipe.weights == "w4a16" else recipe.rotate_down or 1
    return _up(config.intermediate_size, tp * unit) // tp


def rank_config(config: ModelConfig, recipe: Recipe, tp: int) -> ModelConfig:
    """The shape of the part of the model that one of `tp` ranks computes."""
    return replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=config.num_kv_heads // tp,
        intermediate_size=ffn_share(config, recipe, tp),
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
