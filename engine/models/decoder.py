"""The one decoder of all dense families: layers of norm, qkv, rotary, attention, o, norm, gate-up, down; norm; head.

(Above 300 lines: a layer and its model, each step with what it takes and gives.)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels import invariant, ops, reference
from engine.models import names
from engine.models.batch import Batch
from engine.models.cache import KVCache, KVPages
from engine.models.linear import (
    DenseLinear,
    GatedInt4Linear,
    Int8Linear,
    Int8Rows,
    Linear,
    forward_normed,
    gate_and_up,
    read_linear,
    reads_int8,
    settled,
    stack,
)
from engine.models.ranks import Part, Ranks, add_rms_norm, whole
from engine.models.rope import Rope, begin_step
from engine.models.row_parallel import Int8RowParallel, row_parallel, unsummed

Observe = Callable[[str, Tensor], None]
Rows = Tensor | Int8Rows


class DecoderLayer:
    """One transformer layer, dense or quantized by the tensors it is given."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        tile: int = 0,
    ) -> None:
        """`tensors` are named within the layer, such as "self_attn.q_proj.weight" or "mlp.up_proj.qweight". Of several
        `ranks` they are this one's, and `config` is its shape. `tile` is that of `settled`."""
        self.config = config
        # What the kernels that it runs depend on, beside the number of tokens.
        self.kind = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        norms = [tensors[f"{module}.weight"].to(device, dtype) for module in names.NORMS]
        self._attention_norm, self._mlp_norm = norms
        self._head_norms = [
            tensors[f"{module}.weight"].to(device, dtype) for module in (names.HEAD_NORMS if config.qk_norm else ())
        ]
        blocks = {names.DOWN: config.rotate_down}
        linears = {
            module: read_linear(tensors, module, device=device, dtype=dtype, rotated=blocks.get(module, 0))
            for module in names.LINEARS
        }
        self._qkv = settled(stack([linears[module] for module in names.QKV]), dtype, tile=tile)
        self._output = row_parallel(linears[names.OUTPUT], ranks, dtype, tile=tile)
        gate, up = (linears[module] for module in names.GATE_UP)
        self._gate_up = gate_and_up(gate, up, dtype, tile=tile)
        self._down = row_parallel(linears[names.DOWN], ranks, dtype, tile=tile)

    def __call__(
        self,
        hidden: Tensor,
        batch: Batch,
        pages: KVPages | None,
        rope: Rope,
        observe: Observe | None = None,
    ) -> Tensor:
        """hidden [T, hidden] after this layer. `rope` is `rope_tables(config, batch)`.

        Without pages the packed sequences attend to themselves alone. `observe` is told the input [T, in] of every
        linear by its module name, and "self_attn.k" (K after rotary) and "self_attn.v", each [T, kv_heads, head_dim].
        """
        normed = self.attention_input(hidden)
        if pages is None:
            attended = self.attend(normed, batch, rope, observe)
        else:
            attended = self.attend_cached(normed, batch, pages, rope, observe)
        _tell(observe, (names.OUTPUT,), attended)
        hidden = self.after_attention(hidden, attended)
        normed = self.mlp_input(hidden)
        _tell(observe, names.GATE_UP, normed)
        inner = self.inner(normed)
        _tell(observe, (names.DOWN,), inner)
        return self.after_mlp(hidden, inner)

    # The steps of a layer, each the input of one quantizable group of linears or what follows it.

    def attention_input(self, hidden: Tensor) -> Rows:
        """What q, k and v read: [T, hidden]; int8 rows where they are int8."""
        return self._normed(hidden, self._attention_norm, self._qkv)

    def attend(self, normed: Rows, batch: Batch, rope: Rope, observe: Observe | None = None) -> Tensor:
        """What o reads: [T, heads * head_dim], from packed whole sequences that attend to themselves alone."""
        config = self.config
        _tell(observe, names.QKV, normed)
        query, key, value = self._rotated(self._qkv.forward(normed), rope, observe)
        scale = config.head_dim**-0.5
        return ops.causal_attention(query, key, value, batch.query_starts, scale, config.sliding_window).flatten(1)

    def attend_cached(
        self, normed: Rows, batch: Batch, pages: KVPages, rope: Rope, observe: Observe | None = None
    ) -> Tensor:
        """The same over the cache, in which K and V of the batch's tokens are afterwards."""
        qkv = self._qkv.forward(normed)
        if observe is not None:
            # What is written is rotated on its way into the pages: to be told, it is computed once more.
            _tell(observe, names.QKV, normed)
            self._rotated(qkv, rope, observe)
        return self._attend_cached(qkv, batch, pages, rope)

    def _attend_cached(self, qkv: Tensor, batch: Batch, pages: KVPages, rope: Rope) -> Tensor:
        config = self.config
        attended = ops.rope_attention(
            qkv,
            rope,
            (self._head_norms[0], self._head_norms[1]) if config.qk_norm else None,
            config.norm_eps,
            pages,
            batch,
            config.num_heads,
            config.head_dim**-0.5,
            config.sliding_window,
        )
        return attended.flatten(1)

    def _rotated(self, qkv: Tensor, rope: Rope, observe: Observe | None) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        query, key, value = ops.split_heads(qkv, config.num_heads, config.head_dim)
        if config.qk_norm:
            query, key = (
                reference.rms_norm(x, weight, config.norm_eps)
                for x, weight in zip((query, key), self._head_norms, strict=True)
            )
        query, key = reference.apply_rope(query, key, *rope)
        _tell(observe, ("self_attn.k",), key)
        _tell(observe, ("self_attn.v",), value)
        return query, key, value

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The residual stream between attention and MLP: [T, hidden]."""
        return hidden + self._output.forward(attended)

    def mlp_input(self, hidden: Tensor) -> Rows:
        """What gate and up read: [T, hidden]; int8 rows where they are int8."""
        return self._normed(hidden, self._mlp_norm, self._gate_up)

    def inner(self, normed: Rows) -> Rows:
        """What down reads: [T, intermediate]; int8 rows where it is int8."""
        return self._activated(self._gate_up.forward(normed))

    def _activated(self, gate_up: Tensor) -> Rows:
        if isinstance(self._gate_up, GatedInt4Linear):  # the product and the activation at once
            return gate_up
        if reads_int8(self._down):
            return Int8Rows(*ops.silu_and_mul_int8(gate_up, rotated=self.config.rotate_down), gate_up.dtype)
        if isinstance(self._down, Int8RowParallel):
            return self._down.rows(gate_up, gated=True)
        return ops.silu_and_mul(gate_up)

    def after_mlp(self, hidden: Tensor, inner: Rows) -> Tensor:
        """The residual stream behind the layer: [T, hidden]."""
        return hidden + self._down.forward(inner)

    def run(
        self, hidden: Tensor, delta: Tensor | Part | None, batch: Batch, pages: KVPages, rope: Rope
    ) -> tuple[Tensor, Tensor | Part]:
        """`__call__` over the cache, with each sum of the residual stream left to the norm that follows it, and so the
        one over ranks: the stream before this layer is hidden + delta (None: 0), the one behind it is the sum of the
        two results."""
        qkv, hidden = self._forward_normed(self._qkv, hidden, delta, self._attention_norm)
        delta = unsummed(self._output, self._attend_cached(qkv, batch, pages, rope))
        gate_up, hidden = self._forward_normed(self._gate_up, hidden, delta, self._mlp_norm)
        if isinstance(self._down, Int8Linear) and not isinstance(self._gate_up, GatedInt4Linear):
            return hidden, self._down.forward_gated(gate_up)
        return hidden, unsummed(self._down, self._activated(gate_up))

    def _forward_normed(
        self, reader: Linear, hidden: Tensor, delta: Tensor | Part | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `reader` makes of the norm of the stream hidden + delta, and the stream."""
        if delta is None:
            return reader.forward(self._normed(hidden, weight, reader)), hidden
        return forward_normed(reader, delta, hidden, weight, self.config.norm_eps)

    def _normed(self, hidden: Tensor, weight: Tensor, reader: Linear) -> Rows:
        if reads_int8(reader):
            return Int8Rows(*ops.rms_norm_int8(hidden, weight, self.config.norm_eps), hidden.dtype)
        return ops.rms_norm(hidden, weight, self.config.norm_eps)


class Decoder:
    """A whole model: `decoder(batch, cache)` -> logits."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        deterministic: bool = False,
    ) -> None:
        """`weights` by canonical name, dense or quantized; read one layer at a time, so a lazy mapping stays small.

        Of several `ranks`, weights and config are this one's (`RankWeights`, `rank_config`), all compute every batch
        together, and rank 0 alone has the logits of the whole vocabulary; the others get those of their share.
        A `deterministic` model gives a token the same logits, to the bit, whatever else is in the batch and in however
        many steps its context was computed; its batches are `invariant`.
        """
        self.config = config
        self.ranks = ranks
        self.device = torch.device(device)
        self.dtype = dtype
        self.deterministic = deterministic
        self._tile = invariant.tile_rows(self.device) if deterministic else 0
        self._embedding = weights[names.EMBEDDING].to(device, dtype)
        self.layers = [
            DecoderLayer(
                config, _layer_weights(weights, layer), device=device, dtype=dtype, ranks=ranks, tile=self._tile
            )
            for layer in range(config.num_layers)
        ]
        kinds = [layer.kind for layer in self.layers]
        self._kinds = [place for place, kind in enumerate(kinds) if kind not in kinds[:place]]
        self._norm = weights[names.FINAL_NORM].to(device, dtype)
        self._head = self._read_head(weights)

    def __call__(self, batch: Batch, cache: KVCache | None) -> Tensor:
        """Logits float32 [R, vocab] of the tokens at `batch.logits_at`; K and V of all tokens are in `cache` after.

        Without a cache the packed sequences are whole and each attends to itself (page_table and slots are not read).
        """
        return self.logits(batch, cache).float()

    def logits(self, batch: Batch, cache: KVCache | None) -> Tensor:
        """The same in the computing type."""
        return self._logits(batch, cache, self.layers)

    def rehearse(self, batch: Batch, cache: KVCache) -> Tensor:
        """`logits` by one layer of each kind, which means nothing: afterwards what steps of this shape run is compiled,
        and libraries have the memory that they keep. Ranks that differ in them, who must make the same sums all the
        same, go through all layers."""
        layers = [self.layers[place] for place in self._kinds]
        layers = [*layers, layers[0]][: len(self.layers)]  # the first begins in another way than the others
        if self.ranks is not None and not self.ranks.agree(zlib.crc32(repr(self._kinds).encode()), self.device):
            layers = self.layers
        return self._logits(batch, cache, layers)

    def _logits(self, batch: Batch, cache: KVCache | None, layers: Sequence[DecoderLayer]) -> Tensor:
        hidden, rope = begin_step(self.config, self._embedding, batch)
        if cache is None:
            for layer in layers:
                hidden = layer(hidden, batch, None, rope)
            return self._project(ops.rms_norm(hidden[batch.logits_at], self._norm, self.config.norm_eps))
        delta: Tensor | Part | None = None
        for layer, pages in zip(layers, cache.layers[: len(layers)], strict=True):
            hidden, delta = layer.run(hidden, delta, batch, pages, rope)
        assert delta is not None, "a model without layers"
        if len(batch.logits_at) != len(hidden) or batch.decode_lens is not None:
            hidden, delta = hidden[batch.logits_at], whole(delta)[batch.logits_at]
        normed, _ = add_rms_norm(delta, hidden, self._norm, self.config.norm_eps)
        return self._project(normed)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> hidden states [T, hidden]."""
        return torch.nn.functional.embedding(token_ids, self._embedding)

    def head(self, hidden: Tensor) -> Tensor:
        """The final norm and the output matrix: hidden [R, hidden] -> logits float32 [R, vocab]."""
        return self._project(ops.rms_norm(hidden, self._norm, self.config.norm_eps)).float()

    def _project(self, normed: Tensor) -> Tensor:
        """The output matrix; a 4-bit one has whole tiles of outputs, and the last rank's share may be filled up."""
        logits = self._head.forward(normed)
        if self.ranks is not None:
            logits = self.ranks.gather(logits)
        return logits[:, : self.config.vocab_size]

    def _read_head(self, weights: Mapping[str, Tensor]) -> Linear:
        """The output matrix, of the kind whose tensors are there; a tied one that is not quantized is the embedding."""
        module, parts = names.HEAD.removesuffix(".weight"), (names.WEIGHT_SCALE, *names.QUANTIZED)
        found = {name: weights[name] for part in parts if (name := f"{module}.{part}") in weights}
        if not found and self.config.tie_word_embeddings:
            rows = self._embedding if self.ranks is None else _share_of(self._embedding, self.ranks)
            return settled(DenseLinear(rows), self.dtype, tile=self._tile)
        if f"{module}.qweight" not in found:
            found[names.HEAD] = weights[names.HEAD]
        linear = read_linear(found, module, device=self.device, dtype=self.dtype)
        return settled(linear, self.dtype, tile=self._tile)


def _share_of(rows: Tensor, ranks: Ranks) -> Tensor:
    """The run of rows that a rank has of a matrix, zeros at the end where there are too few."""
    share = -(-len(rows) // ranks.size)
    own = rows[ranks.rank * share : (ranks.rank + 1) * share]
    return own if len(own) == share else torch.nn.functional.pad(own, (0, 0, 0, share - len(own)))


def _layer_weights(weights: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The tensors of a layer, named within it, of whatever kind `weights` has."""
    parts = ("weight", "bias", names.WEIGHT_SCALE, *names.QUANTIZED)
    within = (f"{module}.{part}" for module in names.LAYER_SHARDS for part in parts)
    return {name: weights[names.layer_name(layer, name)] for name in within if names.layer_name(layer, name) in weights}


def _tell(observe: Observe | None, modules: tuple[str, ...], value: Rows) -> None:
    if observe is not None:
        value = value.dense() if isinstance(value, Int8Rows) else value
        for module in modules:
            observe(module, value)
