"""The tensors of one tensor-parallel rank, cut from whole ones when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.models.cache import KVScales
from engine.storage import head_files
from engine.storage import turbomind_layout as layout
from engine.storage.rank_cuts import RankCut, rank_cut


class RankWeights(Mapping[str, Tensor]):
    """What rank `rank` of `tp` computes with, by canonical name; `rank_config` says its shape. Nothing is kept.

    Heads and FFN features are dealt in contiguous runs; the FFN is filled up with zeros so that all ranks have equal
    shapes. The head has the rank's share of the vocabulary, zeros at its end. A bias of a linear that
    is cut along its inputs is added once: rank 0 has it, the others do not; all have it where the linear is int8, whose
    sums are added up before they are scaled. Norms and the embedding are whole.
    """

    def __init__(self, whole: Mapping[str, Tensor], config: ModelConfig, recipe: Recipe, *, rank: int, tp: int) -> None:
        """ValueError where there is no such rank. The model must fit `tp` (`turbomind_files.check_fits`)."""
        if not 0 <= rank < tp:
            raise ValueError(f"rank {rank} is not one of {tp} ranks: the first is 0 and the last {tp - 1}")
        self._whole, self._config, self._recipe = whole, config, recipe
        self._rank, self._tp = rank, tp
        self._names = dict.fromkeys(name for name in whole if rank_has(name, recipe, rank))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._whole[name]
        module, _, kind = names.split_name(name)[1].rpartition(".")
        if module == head_files.MODULE:
            return head_files.head_of_rank(tensor, kind, self._config, rank=self._rank, tp=self._tp)
        shard = names.LAYER_SHARDS.get(module, names.Shard.REPLICATED)
        if shard is names.Shard.REPLICATED or _is_row_bias(name):
            return tensor
        cut = rank_cut(self._config, self._recipe, (module,), self._tp)
        if shard is names.Shard.COLUMN:
            return self._columns(tensor, kind, cut)
        return self._rows(tensor, kind, cut)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _columns(self, tensor: Tensor, kind: str, cut: RankCut) -> Tensor:
        [size] = cut.pieces
        if kind in ("bias", names.WEIGHT_SCALE):
            return layout.rank_piece(tensor[None], self._rank, size, dim=1)[0]
        if kind in ("qweight", "qzeros"):
            return layout.rank_piece(tensor, self._rank, size // 8, dim=1).contiguous()
        return layout.rank_piece(tensor, self._rank, size, dim=0 if kind == "weight" else 1).contiguous()

    def _rows(self, tensor: Tensor, kind: str, cut: RankCut) -> Tensor:
        [size] = cut.pieces
        if kind == names.WEIGHT_SCALE:
            return tensor
        if kind in ("qzeros", "scales"):
            times = self._recipe.group_size // cut.group_size
            tensor, size = layout.refine_groups(tensor, times), size // cut.group_size
        return layout.rank_piece(tensor, self._rank, size, dim=1 if kind == "weight" else 0).contiguous()


def rank_scales(scales: KVScales, rank: int, tp: int) -> KVScales:
    """The scales of the KV heads that rank `rank` of `tp` keeps."""
    key, value = (torch.chunk(pairs, tp, dim=1)[rank].contiguous() for pairs in (scales.key, scales.value))
    return KVScales(key=key, value=value)


def rank_has(name: str, recipe: Recipe, rank: int) -> bool:
    """Whether a rank computes with a tensor at all, see `RankWeights`."""
    return rank == 0 or recipe.weights == "w8a8" or not _is_row_bias(name)


def _is_row_bias(name: str) -> bool:
    module, _, kind = names.split_name(name)[1].rpartition(".")
    return kind == "bias" and names.LAYER_SHARDS.get(module) is names.Shard.ROW
