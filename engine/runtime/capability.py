"""Whether a device can run a workspace, found out before its weights are read."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from engine.cache_size import CacheSize, num_pages
from engine.config import Dtype, EngineConfig, ModelConfig, Recipe
from engine.kernels.cpu_linear import has_int4
from engine.kernels.ops import HALVES, has_triton
from engine.models import names
from engine.models.cache import page_bytes
from engine.runtime.cache import page_count
from engine.runtime.memory import free_memory

MIB = 2**20
# The largest share of the free memory that is proposed for the cache.
MOST = 0.9
# Inputs of a tile of packed 4-bit weights, which keep a word for each group (a CPU's three bytes): see
# `engine.kernels.int4_weights`.
INT4_TILE = 128
# First compute capability with the type in its matrix units.
BFLOAT16_FROM = (8, 0)
INT8_FROM = (7, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a device is and can do: types that its matrix units know, those in which it multiplies 4-bit weights as they
    are packed, and bytes that are free now."""

    name: str
    bfloat16: bool
    int8: bool
    free_bytes: int
    int4: tuple[torch.dtype, ...] = ()


def probe_device(text: str) -> Device:
    """The device that `EngineConfig.device` names; ValueError where this machine has none of that name."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"device={text} is no device: write cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        int4 = (torch.float32, *HALVES) if has_int4() else ()
        return Device(name="cpu", bfloat16=True, int8=True, free_bytes=free_memory(device), int4=int4)
    if device.type != "cuda":
        raise ValueError(f"device={text} is not supported; cpu and cuda are.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device={text} is not on this machine, which has {count or 'no'} GPUs. device=cpu would run.")
    if device.index is not None:
        torch.cuda.set_device(device)  # kernels, graphs and events belong to the current device
    capability = torch.cuda.get_device_capability(device)
    name = f"{text} ({torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]})"
    return Device(
        name=name,
        bfloat16=capability >= BFLOAT16_FROM,
        int8=capability >= INT8_FROM,
        free_bytes=free_memory(device),
        int4=HALVES if has_triton() else (),
    )


def computing_dtype(config: ModelConfig, engine: EngineConfig) -> Dtype:
    """The type that `engine.dtype` stands for: `auto` is float32 on a CPU and the workspace's own on a GPU."""
    if engine.dtype != "auto":
        return engine.dtype
    return "float32" if torch.device(engine.device).type == "cpu" else config.dtype


def check_capability(
    config: ModelConfig, recipe: Recipe, engine: EngineConfig, device: Device, *, session_len: int
) -> None:
    """ValueError where the device lacks a type, or memory for the weights and one full sequence of KV: those of the
    whole model, or where `engine.tp` ranks share it, of one of its shape.

    The message says what would run. `recipe.kv` is that of the cache as it will be, whatever the workspace says; what
    `engine` leaves open is taken from the defaults.
    """
    engine = engine.complete()
    dtype = computing_dtype(config, engine)
    if dtype == "bfloat16" and not device.bfloat16:
        raise ValueError(
            f"{device.name} does not compute in bfloat16, which dtype={engine.dtype} asks for here. "
            "dtype=float16 would run (check its quality: float16 overflows beyond 65504), or dtype=float32."
        )
    if not device.int8 and (recipe.weights == "w8a8" or recipe.head == "int8"):
        needing = "w8a8 weights need" if recipe.weights == "w8a8" else "an int8 head needs"
        raise ValueError(
            f"{device.name} does not multiply int8 matrices, which {needing}. An artifact with weights=w4a16 or "
            "weights=fp16 would run."
        )
    _check_memory(config, recipe, engine, device, dtype=getattr(torch, dtype), session_len=session_len)


def weight_bytes(
    config: ModelConfig, recipe: Recipe, dtype: torch.dtype, *, int4: Collection[torch.dtype] = (), tp: int = 1
) -> int:
    """Memory that the weights take when they run in `dtype`. Where that is none of `int4`, in which the device
    multiplies 4-bit weights as they are packed, linears keep what they unpack beside them. `config` is the shape of one
    of `tp` ranks, which have an equal share of the output matrix each."""
    total = 0
    for name, shape in names.model_tensors(config).items():
        count = torch.Size(shape).numel() // (tp if name == names.HEAD else 1)
        linear = names.split_name(name)[1].removesuffix(".weight") in names.LINEARS
        if recipe.weights == "w8a8" and linear:
            total += count + shape[0] * 4
            continue
        if name == names.HEAD and recipe.head == "int8":
            total += count + shape[0] // tp * 4
            continue
        packed = (recipe.weights == "w4a16" and linear) or (name == names.HEAD and recipe.head == "int4")
        if packed and dtype in int4:
            total += count // 2 + count // math.gcd(recipe.group_size, INT4_TILE) * 4
            continue
        total += count * dtype.itemsize
        if packed:
            groups = count // recipe.group_size
            total += count // 2 + groups // 2 + groups * 2
    return total


def _check_memory(
    config: ModelConfig, recipe: Recipe, engine: EngineConfig, device: Device, *, dtype: torch.dtype, session_len: int
) -> None:
    page_len, entry = engine.cache_block_seq_len, engine.cache_max_entry_count
    if session_len < 1:
        return  # said where it is used

    def size(dtype: torch.dtype, kv: str) -> int:
        per_token = recipe.kv_granularity == "token"
        return page_bytes(config, page_len=page_len, dtype=dtype, quantized=kv == "kv8", per_token=per_token)

    def pages(dtype: torch.dtype, kv: str, entry: CacheSize, session_len: int) -> int:
        """Pages that there would be room for; 0 where one sequence does not fit."""
        page = size(dtype, kv)
        left = device.free_bytes - weight_bytes(config, recipe, dtype, int4=device.int4, tp=engine.tp)
        try:
            count = page_count(
                entry, page_bytes=page, free_bytes=max(left, 0), page_len=page_len, session_len=session_len
            )
        except ValueError:
            return 0
        return count if count * page <= left else 0

    if pages(dtype, recipe.kv, entry, session_len):
        return
    page = size(dtype, recipe.kv)
    runs = []
    if fitting := pages(dtype, recipe.kv, entry, 1):
        runs.append(f"session_len={fitting * page_len}")
    if pages(dtype, recipe.kv, MOST, session_len):
        runs.append(f"cache_max_entry_count={MOST}")
    if recipe.kv == "kv16" and pages(dtype, "kv8", entry, session_len):
        runs.append("an artifact with kv=kv8")
    if dtype == torch.float32 and pages(torch.float16, recipe.kv, entry, session_len):
        runs.append("dtype=bfloat16" if config.dtype == "bfloat16" and device.bfloat16 else "dtype=float16")
    weights = weight_bytes(config, recipe, dtype, int4=device.int4, tp=engine.tp)
    sequence = -(-session_len // page_len) * page
    asked = num_pages(entry, page_bytes=page, free_bytes=max(device.free_bytes - weights, 0)) * page
    if asked and weights + asked > device.free_bytes:
        cache = f"and the KV cache {asked / MIB:.0f} MiB (cache_max_entry_count={entry}). "
    else:
        cache = (
            f"and the KV cache of one sequence of session_len {session_len} takes {sequence / MIB:.0f} MiB out of what "
            f"cache_max_entry_count={entry} gives it. "
        )
    raise ValueError(
        f"{device.name} has {device.free_bytes / MIB:.0f} MiB free. The weights ({recipe.weights}, computed in "
        f"{str(dtype).removeprefix('torch.')}) take {weights / MIB:.0f} MiB, {cache}"
        + (f"What would run: {', or '.join(runs)}." if runs else "No setting of this artifact would run here.")
    )
