"""Scales of the int8 KV cache on disk: a pair for K and V of every layer and rank, and finer ones beside it.

`layers.<i>.past_kv_scale.<rank>.weight` holds float32 [k_scale, k_zero, v_scale, v_zero] for all heads of the rank.
The other two files are ours, and what counts where they are:

- `layers.<i>.past_kv_scale.ranks`: float32 [runs, 4], a row for each of `runs` equal runs of the KV heads. It is there
  only where one rank's heads have different scales: they have one each (`head`), or ranks were merged.
- `layers.<i>.past_kv_scale.channels`: float32 [4, kv_heads, head_dim], with the granularity `channel` alone. K's
  channels are in TurboMind's rotary order, as the columns of w_qkv are.

Neither depends on the number of ranks. Scales of every token (`token`) have no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import KVGranularity, ModelConfig
from engine.models.cache import KVScales, PerToken
from engine.storage.turbomind_layout import interleave_rotary, separate_rotary

Row = Sequence[float] | NDArray[np.float32]
BYTES = 16
# Half the distance from the lowest to the highest byte, in scales: what a pair can represent around its zero point.
REACH = 127.5


def rank_file(layer: int, rank: int) -> str:
    return f"layers.{layer}.past_kv_scale.{rank}.weight"


def runs_file(layer: int) -> str:
    return f"layers.{layer}.past_kv_scale.ranks"


def write_kv_scales(folder: Path, layer: int, scales_per_rank: Sequence[Row]) -> None:
    """Write (k_scale, k_zero, v_scale, v_zero) of every rank as float32; ValueError when a scale is not above 0."""
    for rank, row in enumerate(scales_per_rank):
        _checked(row, f"layer {layer}, rank {rank}").tofile(folder / rank_file(layer, rank))


def channels_file(layer: int) -> str:
    return f"layers.{layer}.past_kv_scale.channels"


def write_layer_scales(folder: Path, layer: int, scales: Tensor, *, granularity: KVGranularity, tp: int) -> None:
    """Write the scales of a layer, float32 [kv_heads, head_dim, 4], for `tp` ranks; reading them gives them again.

    Whatever the granularity, every rank gets the one pair that covers all of its heads, for engines that know no other.
    """
    if granularity == "channel":
        _checked(scales.reshape(-1, 4).numpy(), f"layer {layer}")
        write_kv_scales(folder, layer, [covering_row(rank.reshape(-1, 4)) for rank in scales.chunk(tp)])
        key, value = scales.permute(2, 0, 1).chunk(2)
        turned = torch.stack([interleave_rotary(plane, scales.shape[1]) for plane in key])
        torch.cat([turned, value]).numpy().astype("<f4").tofile(folder / channels_file(layer))
        return
    heads = scales[:, 0]
    write_kv_scales(folder, layer, [covering_row(rank) for rank in heads.chunk(tp)])
    runs = num_runs(heads)
    if runs > tp:
        rows = heads[:: len(heads) // runs].contiguous()
        rows.numpy().astype("<f4").tofile(folder / runs_file(layer))


def read_scales(folder: Path, config: ModelConfig, granularity: KVGranularity, *, tp: int) -> KVScales | PerToken:
    """The scales of all layers, however they are written.

    The reference takes scale 1 for a missing file and says nothing; here FileNotFoundError names it, and a file of a
    wrong size or with a scale that cannot be is a ValueError. Two numbers, scales of K and V, are symmetric ones of
    LMDeploy's, where every file has them: one alone is a file that is cut off.
    """
    if granularity == "token":
        return PerToken()
    if granularity == "channel":
        scales = torch.stack([_read_channels(folder / channels_file(i), config) for i in range(config.num_layers)])
    else:
        read = _symmetric_row if _all_symmetric(folder, num_layers=config.num_layers, tp=tp) else _read_row
        heads = [_read_heads(folder, layer, config.num_kv_heads, tp, read) for layer in range(config.num_layers)]
        scales = torch.stack(heads)[:, :, None].expand(-1, -1, config.head_dim, -1)
    return KVScales(key=scales[..., :2].contiguous(), value=scales[..., 2:].contiguous())


def layer_of(scales: KVScales, layer: int) -> Tensor:
    """The scales of one layer as `write_layer_scales` takes them: float32 [kv_heads, head_dim, 4]."""
    return torch.cat([scales.key[layer], scales.value[layer]], dim=-1)


def covering_row(heads: Tensor) -> list[float]:
    """One (k_scale, k_zero, v_scale, v_zero) that represents what those of [heads, 4] do: theirs, if they are equal."""
    if bool((heads == heads[0]).all()):
        return [float(value) for value in heads[0]]
    row: list[float] = []
    for pairs in heads.double().view(-1, 2, 2).unbind(1):
        scale, zero = pairs.unbind(1)
        low, high = (zero - REACH * scale).min(), (zero + REACH * scale).max()
        row += [float((high - low) / (2 * REACH)), float((low + high) / 2)]
    return row


def num_runs(heads: Tensor) -> int:
    """The smallest number of equal runs of the heads [heads, 4] within which all scales are equal."""
    count = len(heads)
    return next(
        runs
        for runs in range(1, count + 1)
        if count % runs == 0 and torch.equal(heads[:: count // runs].repeat_interleave(count // runs, dim=0), heads)
    )


def _read_channels(path: Path, config: ModelConfig) -> Tensor:
    """[kv_heads, head_dim, 4]"""
    _check_size(path, BYTES * config.num_kv_heads * config.head_dim)
    planes = np.fromfile(path, dtype="<f4").astype(np.float32).reshape(4, config.num_kv_heads, config.head_dim)
    key, value = torch.from_numpy(planes).chunk(2)
    turned = [separate_rotary(plane, config.head_dim) for plane in key]
    scales = torch.stack([*turned, *value], dim=-1)
    _checked(scales.view(-1, 4).numpy(), str(path))
    return scales


def _read_heads(
    folder: Path, layer: int, num_kv_heads: int, tp: int, read: Callable[[Path], NDArray[np.float32]]
) -> Tensor:
    """[kv_heads, 4]"""
    path = folder / runs_file(layer)
    if path.is_file():
        runs, rest = divmod(path.stat().st_size, BYTES)
        if rest or not runs or num_kv_heads % runs:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes: it must hold four float32 for each of equal runs of "
                f"the {num_kv_heads} KV heads"
            )
        rows = _checked(np.fromfile(path, dtype="<f4").reshape(-1, 4), str(path))
    else:
        rows = np.stack([read(folder / rank_file(layer, rank)) for rank in range(tp)])
    return torch.from_numpy(rows.astype(np.float32)).repeat_interleave(num_kv_heads // len(rows), dim=0)


def _checked(rows: Row, what: str) -> NDArray[np.float32]:
    """One row [4] or many [n, 4] as they lie in files."""
    values = np.asarray(rows, dtype="<f4")
    flat = values.reshape(-1, values.shape[-1])
    good = np.isfinite(flat).all(axis=1) & (flat[:, 0] > 0) & (flat[:, -2] > 0)
    if values.shape[-1] != 4 or not good.all():
        raise ValueError(
            f"KV scales of {what} are {flat[np.argmin(good)].tolist()}: they must be four finite numbers "
            "(K scale, K zero point, V scale, V zero point) with scales above 0"
        )
    return values


def _all_symmetric(folder: Path, *, num_layers: int, tp: int) -> bool:
    paths = (folder / rank_file(layer, rank) for layer in range(num_layers) for rank in range(tp))
    return all(path.is_file() and path.stat().st_size == BYTES // 2 for path in paths)


def _symmetric_row(path: Path) -> NDArray[np.float32]:
    key, value = np.fromfile(path, dtype="<f4")
    return _checked([key, 0.0, value, 0.0], str(path))


def _read_row(path: Path) -> NDArray[np.float32]:
    _check_size(path, BYTES)
    return _checked(np.fromfile(path, dtype="<f4"), str(path))


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it should be there with {expected} bytes")
    if (found := path.stat().st_size) != expected:
        raise ValueError(f"{path} has {found} bytes where {expected} are expected: it is damaged or of another model")
