"""The paged KV cache: per layer two tensors of pages, in the computing type or as bytes with a scale per KV head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScales:
    """Scale and zero point of int8 K and V for every layer and KV head: each float32 [num_layers, kv_heads, 2].

    [..., 0] is the scale and [..., 1] the zero point, however they came (a rank's pair is repeated over its heads).
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """One layer of the cache: key and value [num_pages, kv_heads, page_len, head_dim].

    The pages are uint8 exactly when the four scales (float32 [kv_heads]) are there.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None


class KVCache:
    """The pages of all layers. `layers[i]` is written and read by layer i; who owns a page is not known here."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
        scales: KVScales | None = None,
    ) -> None:
        """Allocates zeroed pages: int8 (as uint8) where `scales` are given, else `dtype`."""
        if scales is not None:
            _check_scales(scales, config)
        self.num_pages = num_pages
        self.page_len = page_len
        shape = (num_pages, config.num_kv_heads, page_len, config.head_dim)
        self.layers: list[KVPages] = []
        for layer in range(config.num_layers):
            stored = dtype if scales is None else torch.uint8
            key, value = (_zeroed(shape, stored, device) for _ in range(2))
            if scales is None:
                self.layers.append(KVPages(key=key, value=value))
                continue
            key_pair, value_pair = scales.key[layer].to(device), scales.value[layer].to(device)
            self.layers.append(
                KVPages(
                    key=key,
                    value=value,
                    key_scale=key_pair[:, 0].contiguous(),
                    key_zero=key_pair[:, 1].contiguous(),
                    value_scale=value_pair[:, 0].contiguous(),
                    value_zero=value_pair[:, 1].contiguous(),
                )
            )


def page_bytes(config: ModelConfig, *, page_len: int, dtype: torch.dtype, quantized: bool) -> int:
    """Memory of one page over all layers, K and V together."""
    size = 1 if quantized else dtype.itemsize
    return 2 * config.num_layers * config.num_kv_heads * page_len * config.head_dim * size


def _zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, of which a CPU gets no memory before it is written: torch.zeros would touch every byte at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _check_scales(scales: KVScales, config: ModelConfig) -> None:
    expected = (config.num_layers, config.num_kv_heads, 2)
    for name, pairs in (("key", scales.key), ("value", scales.value)):
        if tuple(pairs.shape) != expected or pairs.dtype != torch.float32:
            raise ValueError(
                f"KV scales of {name} are {pairs.dtype} {tuple(pairs.shape)}; this model needs torch.float32 "
                f"{expected}: (layers, KV heads, scale and zero point)"
            )
        if not bool((pairs[..., 0] > 0).all()) or not bool(pairs.isfinite().all()):
            raise ValueError(
                f"KV scales of {name} hold a scale that is not positive or a value that is not finite: calibrate again"
            )
