"""The door of a checkpoint: where each canonical tensor lies in it, and what is taken of the stored one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models import names
from engine.models.layouts import Layout
from engine.models.quantization import Quantization
from engine.storage.packed_weights import reader, stored_kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The stored tensor that a canonical one is made of, its whole shape, and how: None for just as it is.

    `codes`: the type of the integers that it holds instead of floats, "I32" for words of packed codes or "I8".
    """

    stored: str
    shape: tuple[int, ...]
    take: Callable[[Tensor], Tensor] | None = None
    codes: str | None = None

    def of(self, stored: Tensor) -> Tensor:
        return stored if self.take is None else self.take(stored)


def sources(config: ModelConfig, layout: Layout, quantization: Quantization | None = None) -> dict[str, Source]:
    """Canonical name -> source for every tensor of the model, in the order of the forward pass.

    With a quantization the linears of the layers have the canonical names of quantized ones.
    """
    found: dict[str, Source] = {}
    for name, shape in names.model_tensors(config).items():
        layer, within = names.split_name(name)
        if layer is None:
            found[name] = _outer(name, shape, config, layout)
            continue
        module, _, part = within.rpartition(".")
        stored = f"{layout.layer_prefix}{layer}.{layout.modules.get(module, module)}.{part}"
        take = None
        if module in names.QKV:
            if layout.qkv != "apart":
                take = partial(_stacked if layout.qkv == "stacked" else _per_kv_head, module=module, config=config)
                shape = (sum(names.linear_shape(config, one)[0] for one in names.QKV), *shape[1:])
            elif layout.rotary == "adjacent" and module != names.QKV[2]:
                take = partial(_half_split, head_dim=config.head_dim)
        source = Source(stored=stored, shape=shape, take=take)
        if quantization is not None and part == "weight" and module in names.LINEARS:
            found |= _packed(name.removesuffix(part), source, quantization)
        else:
            found[name] = source
    return found


def _packed(prefix: str, dense: Source, quantization: Quantization) -> dict[str, Source]:
    """The quantized tensors of a linear, from where its weight would be."""
    outputs, inputs = dense.shape
    module = dense.stored.removesuffix("weight")
    return {
        f"{prefix}{kind}": Source(
            stored=f"{module}{stored}", shape=shape, take=reader(quantization, kind, dense.take), codes=codes
        )
        for kind, (stored, shape, codes) in stored_kinds(quantization, outputs, inputs).items()
    }


def _outer(name: str, shape: tuple[int, ...], config: ModelConfig, layout: Layout) -> Source:
    stored = {names.EMBEDDING: layout.embedding, names.FINAL_NORM: layout.final_norm, names.HEAD: layout.head}[name]
    if name == names.HEAD and config.tie_word_embeddings:
        stored = layout.embedding
    unit = name == names.HEAD and layout.unit_head
    return Source(stored=stored, shape=shape, take=torch.nn.functional.normalize if unit else None)


def _stacked(stored: Tensor, *, module: str, config: ModelConfig) -> Tensor:
    """The rows of q, k or v in a matrix (or bias) of q, then k, then v."""
    rows = [names.linear_shape(config, one)[0] for one in names.QKV]
    first = sum(rows[: names.QKV.index(module)])
    return stored[first : first + rows[names.QKV.index(module)]]


def _per_kv_head(stored: Tensor, *, module: str, config: ModelConfig) -> Tensor:
    """The rows of q, k or v where the heads of each KV head lie together: its queries', its k, its v."""
    rest, group = stored.shape[1:], config.num_heads // config.num_kv_heads
    heads = stored.reshape(config.num_kv_heads, group + 2, config.head_dim, *rest)
    places = dict(zip(names.QKV, (slice(group), slice(group, group + 1), slice(group + 1, None)), strict=True))
    return heads[:, places[module]].reshape(-1, *rest)


def _half_split(stored: Tensor, *, head_dim: int) -> Tensor:
    """Rows with rotary pairs (2j, 2j + 1) of every head as rows with pairs (j, j + head_dim/2)."""
    return stored.reshape(-1, head_dim // 2, 2, *stored.shape[1:]).transpose(1, 2).reshape(stored.shape)
