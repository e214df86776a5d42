"""Statistics of what flows through a layer: one sample's are taken at once, samples' are joined in order.

All sums are float32. Means are sums divided by the number of tokens at the end, so the order of joining is the
only order there is, and it is the samples' own: bits do not depend on how many samples run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Statistics = dict[str, Tensor]

SQUARE_BLOCK: Final = 256  # channels at a time: a product of that many is as quick as a whole one, per operation
KEY: Final = "self_attn.k"
VALUE: Final = "self_attn.v"
_JOIN: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "absmax": torch.maximum,
    "sum": torch.add,
    "abssum": torch.add,
    "tokens": torch.add,
    "gram": Tensor.add_,
    "drift": Tensor.add_,
    "rows": lambda left, right: torch.cat((left, right)),
}


def channel_statistics(x: Tensor) -> Statistics:
    """min, max, absmax, sum and abssum per channel of [T, channels], and the number of tokens."""
    wide = x.float()
    low, high = wide.aminmax(dim=0)
    magnitude = wide.abs()
    return {
        "min": low,
        "max": high,
        "absmax": magnitude.amax(dim=0),
        "sum": wide.sum(dim=0),
        "abssum": magnitude.sum(dim=0),
        "tokens": torch.tensor(float(len(x))),
    }


def some_rows(x: Tensor, count: int) -> Statistics:
    """`rows`, at most `count` of [T, channels] at equal distances and in float32, and `absmax` per channel over all.

    They are taken from the middles of equal parts: the first token of a block, which is like no other, is one of many.
    """
    count = min(count, len(x))
    places = (torch.arange(count, device=x.device) * len(x) + len(x) // 2) // count
    return {"rows": x[places].float(), "absmax": x.abs().amax(dim=0).float()}


def head_statistics(x: Tensor) -> Statistics:
    """min, max and absmax of K or V [T, kv_heads, head_dim], each [kv_heads, head_dim]."""
    low, high = x.float().aminmax(dim=0)
    return {"min": low, "max": high, "absmax": torch.maximum(low.abs(), high.abs())}


def gram(x: Tensor) -> Statistics:
    """X^T X float32 of [T, channels] and the number of tokens: the trace of d (X^T X) d^T is the squared error that a
    difference d of the weights makes. Sums are taken in float32 whatever the type of X."""
    return {"gram": _product(x, x) if x.is_cuda else square(x.float()), "tokens": torch.tensor(float(len(x)))}


def gram_and_drift(x: Tensor, wanted: Tensor) -> Statistics:
    """`gram(x)` and `drift` (wanted - X)^T X: how far the inputs are from those of the unquantized model, as a linear
    layer can see it."""
    return gram(x) | {"drift": _product(wanted - x, x)}


def square(x: Tensor) -> Tensor:
    """X^T X on a CPU: blocks above the diagonal are computed, and mirrored below it."""
    channels = x.shape[1]
    found, turned = x.new_empty(channels, channels), x.t()
    for first in range(0, channels, SQUARE_BLOCK):
        last = min(first + SQUARE_BLOCK, channels)
        torch.mm(turned[first:last], x[:, first:], out=found[first:last, first:])
        found[last:, first:last] = found[first:last, last:].t()
    return found


def _product(x: Tensor, y: Tensor) -> Tensor:
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x.t(), y, out_dtype=torch.float32)
    return x.float().t() @ y.float()


def join(left: Statistics, right: Statistics) -> Statistics:
    """The statistics of both parts together. Matrices are added up in those of `left`, which is used up."""
    return {name: _JOIN[name](left[name], right[name]) for name in left}


def with_means(statistics: Statistics) -> Statistics:
    """Sums turned into means: min, max, mean, absmax, absmean as they are stored."""
    tokens = statistics["tokens"]
    means = {"mean": statistics["sum"] / tokens, "absmean": statistics["abssum"] / tokens}
    return {name: statistics[name] for name in ("min", "max", "absmax")} | means


class Observer:
    """Takes what a layer tells while one sample runs: `observe(module, tensor)`, then `seen`.

    `of_input` is applied to the input of each linear, once where several linears read the same tensor; `of_kv` to
    K after rotary and to V (None: not wanted).
    """

    def __init__(
        self, *, of_input: Callable[[Tensor], Statistics], of_kv: Callable[[Tensor], Statistics] | None
    ) -> None:
        self._of_input = of_input
        self._of_kv = of_kv
        self._last: tuple[Tensor, Statistics] | None = None
        self.seen: dict[str, Statistics] = {}

    def __call__(self, module: str, tensor: Tensor) -> None:
        if module in (KEY, VALUE):
            if self._of_kv is not None:
                self.seen[module] = self._of_kv(tensor)
            return
        if self._last is None or self._last[0] is not tensor:
            self._last = (tensor, self._of_input(tensor))
        self.seen[module] = self._last[1]
