"""The paged KV cache: per layer two tensors of pages, in the computing type or as bytes with scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScales:
    """Scale and zero point of int8 K and V for every layer, KV head and channel: each float32
    [num_layers, kv_heads, head_dim, 2].

    [..., 0] is the scale and [..., 1] the zero point, however they came: one of a head, or of a rank, is repeated.
    """

    key: Tensor
    value: Tensor

    @classmethod
    def of_heads(cls, *, key: Tensor, value: Tensor, head_dim: int) -> KVScales:
        """The scales where all channels of a head have one pair: key and value float32 [num_layers, kv_heads, 2]."""
        key, value = (pairs[:, :, None].expand(-1, -1, head_dim, -1).contiguous() for pairs in (key, value))
        return cls(key=key, value=value)


@dataclass(frozen=True, slots=True)
class PerToken:
    """int8 K and V whose scale and zero point are taken from every token and KV head itself when it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """One layer of the cache: key and value [num_pages, kv_heads, page_len, head_dim], in one of three forms.

    - As computed: nothing beside them.
    - uint8, static: key_scale, key_zero, value_scale, value_zero float32 [kv_heads, head_dim].
    - uint8, dynamic: key_steps, value_steps float16 [num_pages, kv_heads, page_len, 2] = (scale, zero point).
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    key_zero: Tensor | None = None
    value_scale: Tensor | None = None
    value_zero: Tensor | None = None
    key_steps: Tensor | None = None
    value_steps: Tensor | None = None


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
        scales: KVScales | PerToken | None = None,
    ) -> None:
        """Allocates zeroed pages: int8 (as uint8) where `scales` are given, else `dtype`."""
        if isinstance(scales, KVScales):
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
            elif isinstance(scales, PerToken):
                key_steps, value_steps = (_zeroed((*shape[:3], 2), torch.float16, device) for _ in range(2))
                self.layers.append(KVPages(key=key, value=value, key_steps=key_steps, value_steps=value_steps))
            else:
                key_scale, key_zero = scales.key[layer].to(device).unbind(-1)
                value_scale, value_zero = scales.value[layer].to(device).unbind(-1)
                self.layers.append(
                    KVPages(
                        key=key,
                        value=value,
                        key_scale=key_scale.contiguous(),
                        key_zero=key_zero.contiguous(),
                        value_scale=value_scale.contiguous(),
                        value_zero=value_zero.contiguous(),
                    )
                )


def page_bytes(
    config: ModelConfig, *, page_len: int, dtype: torch.dtype, quantized: bool, per_token: bool = False
) -> int:
    """Memory of one page over all layers, K and V together; with `per_token`, of the scales beside the bytes too."""
    size = 1 if quantized else dtype.itemsize
    row = config.head_dim * size + (2 * torch.float16.itemsize if quantized and per_token else 0)
    return 2 * config.num_layers * config.num_kv_heads * page_len * row


def _zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, of which a CPU gets no memory before it is written: torch.zeros would touch every byte at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _check_scales(scales: KVScales, config: ModelConfig) -> None:
    expected = (config.num_layers, config.num_kv_heads, config.head_dim, 2)
    for name, pairs in (("key", scales.key), ("value", scales.value)):
        if tuple(pairs.shape) != expected or pairs.dtype != torch.float32:
            raise ValueError(
                f"KV scales of {name} are {pairs.dtype} {tuple(pairs.shape)}; this model needs torch.float32 "
                f"{expected}: (layers, KV heads, channels, scale and zero point)"
            )
        if not bool((pairs[..., 0] > 0).all()) or not bool(pairs.isfinite().all()):
            raise ValueError(
                f"KV scales of {name} hold a scale that is not positive or a value that is not finite: calibrate again"
            )
