"""What one rank holds of a workspace: its share of the model and of the KV scales; all, where there is one rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.config import EngineConfig
from engine.models.cache import KVScales, PerToken
from engine.models.decoder import Decoder
from engine.models.ranks import Ranks
from engine.runtime.capability import check_capability, computing_dtype, probe_device
from engine.storage.ini_keys import KV_INT8
from engine.storage.rank_cuts import rank_config
from engine.storage.rank_weights import rank_scales
from engine.storage.turbomind_files import check_fits
from engine.storage.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part of a model, and how K and V of its heads are quantized; None: as computed."""

    model: Decoder
    kv_scales: KVScales | PerToken | None


def check_share(workspace: Workspace, config: EngineConfig, rank: int) -> None:
    """ValueError where the workspace cannot be run as `config`, with nothing left open, says: by so many ranks, with
    this KV cache, on the device of this rank. No weight is read."""
    recipe = replace(workspace.recipe, kv="kv16", kv_granularity="tensor")
    if config.quant_policy == KV_INT8:
        if workspace.kv_scales(unused=True) is None:
            raise ValueError(
                f"quant_policy is 4 (int8 KV cache), but {workspace.folder} has no KV scales "
                "(layers.*.past_kv_scale.*.weight). Set quant_policy to 0, or build the artifact with kv=kv8."
            )
        recipe = replace(recipe, kv="kv8", kv_granularity=workspace.ini.ingot.kv_granularity)
    check_ranks(config)
    check_fits(workspace.config, workspace.recipe, config.tp)
    shape = rank_config(workspace.config, workspace.recipe, config.tp)
    device = probe_device(rank_device(config.device, rank, config.tp))
    if device.name == "cpu":  # which the ranks share
        device = replace(device, free_bytes=device.free_bytes // config.tp)
    check_capability(shape, recipe, config, device, session_len=config.session_len)


def check_ranks(config: EngineConfig) -> None:
    """ValueError where there are not so many devices, or their sums would not be what is asked for."""
    device, tp = config.device, config.tp
    if tp > 2 and config.deterministic:
        raise ValueError(
            f"deterministic with tp={tp}: the order of a sum over more than two ranks depends on how much is summed at "
            "once. tp=2 or tp=1 would run."
        )
    if tp == 1 or torch.device(device).type != "cuda":
        return
    if torch.device(device).index is not None:
        raise ValueError(
            f"device={device} with tp={tp}: the ranks run on the GPUs 0 to {tp - 1}. Give device=cuda; "
            "CUDA_VISIBLE_DEVICES says which GPUs these are."
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < tp:
        raise ValueError(f"tp={tp} needs {tp} GPUs, and this machine has {count or 'none'}. tp={count or 1} would run.")


def rank_device(device: str, rank: int, tp: int) -> str:
    """The device of a rank: with several, every one has a GPU of its own, or all share the CPU."""
    return device if tp == 1 or torch.device(device).type == "cpu" else f"{device}:{rank}"


def share_of_workspace(
    workspace: Workspace, config: EngineConfig, rank: int, digests: dict[str, str] | None = None
) -> Share:
    """The share of one of `config.tp` ranks, read and cut from a workspace of whatever tp; see `check_share`, which
    makes the rank's device the current one.

    `digests` takes the SHA-256 of the files that were streamed, by path within the folder.
    """
    if not config.streams_weights:
        return _share(workspace, config, rank)
    device = torch.device(rank_device(config.device, rank, config.tp))
    with workspace.stream(device, rank=rank, tp=config.tp) as read:
        share = _share(workspace, config, rank)
    if digests is not None:
        digests |= read
    return share


def _share(workspace: Workspace, config: EngineConfig, rank: int) -> Share:
    dtype = getattr(torch, computing_dtype(workspace.config, config))
    scales = workspace.kv_scales(unused=True) if config.quant_policy == KV_INT8 else None
    if config.tp == 1:
        model = Decoder(
            config.applied_to(workspace.config),
            workspace.weights(),
            device=config.device,
            dtype=dtype,
            deterministic=config.deterministic,
        )
        return Share(model=model, kv_scales=scales)
    model = Decoder(
        config.applied_to(rank_config(workspace.config, workspace.recipe, config.tp)),
        workspace.rank_weights(rank, config.tp),
        device=rank_device(config.device, rank, config.tp),
        dtype=dtype,
        ranks=Ranks(rank, config.tp),
        deterministic=config.deterministic,
    )
    if isinstance(scales, KVScales):
        scales = rank_scales(scales, rank, config.tp)
    return Share(model=model, kv_scales=scales)
