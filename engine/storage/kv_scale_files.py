"""Scales of the int8 KV cache on disk: a pair for K and V of every layer and rank, and finer ones after a merge.

`layers.<i>.past_kv_scale.<rank>.weight` holds float32 [k_scale, k_zero, v_scale, v_zero] for all heads of the rank.
`layers.<i>.past_kv_scale.ranks` is ours: float32 [runs, 4], a row for each of `runs` equal runs of the KV heads. It is
there only where one rank's heads have different scales, which happens when ranks are merged, and is then what counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.cache import KVScales

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


def write_head_scales(folder: Path, layer: int, heads: Tensor, tp: int) -> None:
    """Write the scales of a layer, float32 [kv_heads, 4], for `tp` ranks, so that reading them gives `heads` again.

    A rank whose heads differ gets the one pair that covers all of theirs, for engines that know no other.
    """
    write_kv_scales(folder, layer, [covering_row(rank) for rank in heads.chunk(tp)])
    runs = num_runs(heads)
    if runs > tp:
        rows = heads[:: len(heads) // runs].contiguous()
        rows.numpy().astype("<f4").tofile(folder / runs_file(layer))


def read_kv_scales(folder: Path, *, num_layers: int, num_kv_heads: int, head_dim: int, tp: int) -> KVScales:
    """Scale and zero point of every layer and KV head, however they are written.

    The reference takes scale 1 for a missing file and says nothing; here FileNotFoundError names it, and a file of a
    wrong size is a ValueError. Two numbers, scales of K and V, are symmetric ones of LMDeploy's, where every file has
    them: one alone is a file that is cut off.
    """
    layers = []
    symmetric = _all_symmetric(folder, num_layers=num_layers, tp=tp)
    for layer in range(num_layers):
        path = folder / runs_file(layer)
        if path.is_file():
            runs, rest = divmod(path.stat().st_size, BYTES)
            if rest or not runs or num_kv_heads % runs:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes: it must hold four float32 for each of equal runs of "
                    f"the {num_kv_heads} KV heads"
                )
            rows = np.stack([_checked(row, str(path)) for row in np.fromfile(path, dtype="<f4").reshape(-1, 4)])
        else:
            files = [folder / rank_file(layer, rank) for rank in range(tp)]
            rows = np.stack([_symmetric_row(path) if symmetric else _read_row(path) for path in files])
        heads = torch.from_numpy(rows.astype(np.float32)).repeat_interleave(num_kv_heads // len(rows), dim=0)
        layers.append(heads.view(num_kv_heads, 2, 2))
    scales = torch.stack(layers)
    return KVScales.of_heads(key=scales[:, :, 0], value=scales[:, :, 1], head_dim=head_dim)


def heads_of(scales: KVScales, layer: int) -> Tensor:
    """The scales of one layer as they lie in files: float32 [kv_heads, 4]."""
    return torch.cat([scales.key[layer, :, 0], scales.value[layer, :, 0]], dim=1)


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


def _checked(row: Row, what: str) -> NDArray[np.float32]:
    values = np.asarray(row, dtype="<f4")
    if values.shape != (4,) or not np.isfinite(values).all() or values[0] <= 0 or values[2] <= 0:
        raise ValueError(
            f"KV scales of {what} are {values.tolist()}: they must be four finite numbers "
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
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it should be there with {BYTES} bytes")
    if (found := path.stat().st_size) != BYTES:
        raise ValueError(f"{path} has {found} bytes where {BYTES} are expected: it is damaged or of another model")
    return _checked(np.fromfile(path, dtype="<f4"), str(path))
