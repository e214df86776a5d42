"""Calibration blocks on their way through a model that is being quantized, from one pair of modules to the next.

A linear sees the inputs that it will have when everything before it is quantized, within its own layer too. Beside
them, where it is asked for, go the same blocks through the unquantized model: the difference is what later linears can
make up for (Li et al. 2025, GPTAQ).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.models.decoder import DecoderLayer, Rows
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.cost import KEPT
from pipelines.quant.observers import Statistics, gram, gram_and_drift
from pipelines.quant.pairs import ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, Pair
from pipelines.quant.stream import Joined, Stream, Workers

# The order in which the inputs of pairs come about.
ORDER = (ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT)


class Walk:
    """The blocks between two layers: through the quantized model and, with `drift`, through the unquantized one."""

    def __init__(
        self, checkpoint: Checkpoint, blocks: Tensor, workers: Workers, *, drift: bool, device: torch.device | str
    ) -> None:
        self.stream = Stream(checkpoint, blocks, workers, device=device)
        self.unquantized = list(self.stream.hidden) if drift else None

    def layer(self, number: int, tensors: Mapping[str, Tensor]) -> LayerWalk:
        """The walk through layer `number`, whose unquantized `tensors` are named within it."""
        return LayerWalk(self, number, tensors)

    def state(self) -> dict[str, Tensor]:
        """Both streams' hidden states between two layers (`Resume`)."""
        beside = {f"unquantized/{sample}": hidden for sample, hidden in enumerate(self.unquantized or [])}
        return self.stream.state() | beside

    def restore(self, read: Callable[[str], Tensor]) -> None:
        """Take the hidden states that `state` had given."""
        self.stream.restore(read)
        if self.unquantized is not None:
            for sample in range(len(self.unquantized)):
                self.unquantized[sample] = read(f"unquantized/{sample}").to(self.stream.device)


class LayerWalk:
    """Inside one layer: `inputs` for each pair of ORDER in turn, then `finish`."""

    def __init__(self, walk: Walk, number: int, tensors: Mapping[str, Tensor]) -> None:
        self._walk = walk
        self._number = number
        self._plain = walk.stream.dense(tensors) if walk.unquantized is not None else None
        # What o_proj reads, until the residual stream behind attention takes the place of the one before it.
        self._attended: dict[int, Tensor] = {}
        # What down_proj reads, of as many samples as KEPT holds: the others' is computed again at the end.
        self._inner: dict[int, Tensor] = {}

    def inputs(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Statistics:
        """`gram`, `tokens` and, where the unquantized model goes along, `drift` of what the linears of `pair` read.

        `tensors` are the layer's as far as it is quantized: every linear before those of `pair` counts.
        """
        stream, layer = self._walk.stream, self._walk.stream.dense(tensors)

        def one(sample: int) -> Statistics:
            seen = self._quantized_input(pair, layer, sample)
            if self._plain is None:
                return gram(seen)
            return gram_and_drift(seen, self._plain_input(pair, self._plain, sample))

        joined = Joined()
        for statistics in stream.workers.in_order(one, len(stream.hidden)):
            joined.add(statistics)
            del statistics  # up to two square matrices, which the next sample's are not to be made beside
        return joined.checked(self._number, pair.after[0])

    def finish(self, tensors: Mapping[str, Tensor], smoothing: Mapping[str, Tensor]) -> None:
        """Move the blocks to the end of the layer that was made of it; `smoothing` is what outputs of linears were
        divided by since `inputs` computed with them."""
        stream, layer = self._walk.stream, self._walk.stream.dense(tensors)
        divisor = smoothing.get(MLP_OUT.before)

        def one(sample: int) -> Tensor:
            inner = self._inner.pop(sample, None)
            if inner is None:
                inner = _floats(layer.inner(layer.mlp_input(stream.hidden[sample])))
            elif divisor is not None:
                inner /= divisor
            return layer.after_mlp(stream.hidden[sample], inner)

        for sample, out in enumerate(stream.workers.in_order(one, len(stream.hidden))):
            stream.hidden[sample] = out

    def _quantized_input(self, pair: Pair, layer: DecoderLayer, sample: int) -> Tensor:
        stream, hidden = self._walk.stream, self._walk.stream.hidden
        if pair is ATTENTION_IN:
            return _floats(layer.attention_input(hidden[sample]))
        if pair is ATTENTION_OUT:
            normed = layer.attention_input(hidden[sample])
            self._attended[sample] = layer.attend(normed, stream.batch, stream.rope)
            return self._attended[sample]
        if pair is MLP_IN:
            hidden[sample] = layer.after_attention(hidden[sample], self._attended.pop(sample))
            return _floats(layer.mlp_input(hidden[sample]))
        inner = _floats(layer.inner(layer.mlp_input(hidden[sample])))
        if (sample + 1) * inner.nbytes <= KEPT:
            self._inner[sample] = inner
        return inner

    def _plain_input(self, pair: Pair, layer: DecoderLayer, sample: int) -> Tensor:
        stream, hidden = self._walk.stream, self._walk.unquantized
        assert hidden is not None
        if pair is ATTENTION_IN:
            return _floats(layer.attention_input(hidden[sample]))
        if pair is ATTENTION_OUT:
            attended = layer.attend(layer.attention_input(hidden[sample]), stream.batch, stream.rope)
            hidden[sample] = layer.after_attention(hidden[sample], attended)
            return attended
        if pair is MLP_IN:
            return _floats(layer.mlp_input(hidden[sample]))
        inner = _floats(layer.inner(layer.mlp_input(hidden[sample])))
        hidden[sample] = layer.after_mlp(hidden[sample], inner)
        return inner


def _floats(rows: Rows) -> Tensor:
    assert isinstance(rows, Tensor)  # the layers of a walk are dense
    return rows


Inputs = Callable[[Pair, Mapping[str, Tensor]], Statistics]
