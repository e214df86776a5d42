"""The kinds of linear layer, one forward for all: y = x W^T + b with x [..., in] and y [..., out].

Int8 ones read rows of int8 as well: what comes before them can quantize in its own pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.kernels import invariant, ops
from engine.kernels.int4_weights import in_turns
from engine.kernels.rotation import rotate
from engine.models import names
from engine.models.ranks import Part, add_rms_norm, whole


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows that are quantized already: int8 values [..., in], float32 scales [...], and the type they stand for."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def dense(self) -> Tensor:
        """The floats that they stand for, in `dtype`."""
        return (self.values.float() * self.scales.unsqueeze(-1)).to(self.dtype)


class Linear(Protocol):
    # A tensor; int8 linears take Int8Rows as well, and those are given to nothing else.
    def forward(self, x: Any) -> Tensor: ...


class DenseLinear:
    """weight [out, in] and bias [out], both in the computing type."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return ops.dense_linear(x, self.weight, self.bias)


class Int4Linear:
    """A weight of 4-bit groups in the AWQ layout (see `unpack_int4`), with a bias [out] in the computing type or none.

    `packed` takes the order of the device's kernels in place of it. Without, the packed tensors stay, and the first
    forward unpacks them once to x's type and keeps the dense weight as well.
    """

    def __init__(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        self.qweight = qweight
        self.qzeros = qzeros
        self.scales = scales
        self.bias = bias
        self._weight: Tensor | None = None

    def packed(self, dtype: torch.dtype) -> Linear:
        """The linear that computes in `dtype` on the device of its tensors."""
        return PackedInt4Linear(self) if ops.packs_int4(self.qweight, self.scales, dtype) else self

    def forward(self, x: Tensor) -> Tensor:
        if self._weight is None or self._weight.dtype != x.dtype:
            self._weight = ops.unpack_int4(self.qweight, self.qzeros, self.scales).to(x.dtype)
        return torch.nn.functional.linear(x, self._weight, self.bias)


class PackedInt4Linear:
    """The same in the order that the kernels of its device read."""

    def __init__(self, linear: Int4Linear) -> None:
        self._weights, self._bias = ops.pack_int4(linear.qweight, linear.qzeros, linear.scales), linear.bias
        self.on_cpu = not linear.qweight.is_cuda

    def forward(self, x: Tensor) -> Tensor:
        return ops.int4_linear(x, self._weights, self._bias)

    def forward_normed(self, delta: Tensor, hidden: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`forward_normed` below, on a GPU."""
        return ops.normed_int4_linear(delta, hidden, norm, eps, self._weights, self._bias)


class GatedInt4Linear:
    """gate and up of an MLP in 4 bits, for a GPU: forward gives silu(gate) * up [..., inner]."""

    def __init__(self, gate: Int4Linear, up: Int4Linear) -> None:
        parts = [(gate.qweight, up.qweight), (gate.qzeros, up.qzeros), (gate.scales, up.scales)]
        self._weights = ops.pack_int4(*(in_turns(*part) for part in parts))
        bias = _join_biases([gate, up], [gate.scales.shape[1], up.scales.shape[1]])
        self._bias = None if bias is None else in_turns(*bias.chunk(2))

    def forward(self, x: Any) -> Tensor:
        return ops.gated_int4_linear(x, self._weights, self._bias)

    def forward_normed(self, delta: Tensor, hidden: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`forward_normed` below."""
        return ops.normed_int4_linear(delta, hidden, norm, eps, self._weights, self._bias, gated=True)


class Int8Linear:
    """An int8 weight [out, in] with float32 scales [out], multiplied with int8 rows; a bias [out] or none.

    With `rotated` it is the weight of inputs that are rotated by blocks of so many channels (`rotation.rotate`) before
    they are rounded; Int8Rows are rotated already.
    """

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, rotated: int = 0) -> None:
        self.weight = weight
        self.scales = scales
        self.bias = bias
        self.rotated = rotated

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        """A float tensor is quantized row by row first; the result has its type."""
        if isinstance(x, Int8Rows):
            shape, values = x.values.shape, x.values.reshape(-1, x.values.shape[-1])
            out = ops.int8_linear(values, x.scales.reshape(-1), self.weight, self.scales, self.bias, x.dtype)
        else:
            x = rotate(x, self.rotated).to(x.dtype)
            shape = x.shape
            out = ops.rounded_int8_linear(x.reshape(-1, shape[-1]), self.weight, self.scales, self.bias)
        return out.view(*shape[:-1], len(self.weight))

    def forward_normed(self, delta: Tensor, hidden: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`forward_normed` below."""
        return ops.normed_int8_linear(delta, hidden, norm, eps, self.weight, self.scales, self.bias)

    def forward_gated(self, gate_up: Tensor) -> Tensor:
        """Of silu(gate) * up [T, in], the two side by side, in one kernel where rows are few on a GPU."""
        return ops.gated_int8_linear(gate_up, self.weight, self.scales, self.bias, self.rotated)


class MixedLinear:
    """Linears of different kinds over one input, outputs side by side."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = tuple(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear.forward(x) for linear in self.linears], dim=-1)


class TiledLinear:
    """A linear that computes `rows` rows at a time, always so many: see `engine.kernels.invariant`."""

    def __init__(self, linear: Linear, rows: int) -> None:
        self.linear, self.rows = linear, rows

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        """x [T, in]."""
        if isinstance(x, Int8Rows):
            values, scales = (invariant.tiles(part, self.rows) for part in (x.values, x.scales))
            tiles = [Int8Rows(*tile, x.dtype) for tile in zip(values, scales, strict=True)]
            return torch.cat([self.linear.forward(tile) for tile in tiles])[: len(x.values)]
        return torch.cat([self.linear.forward(tile) for tile in invariant.tiles(x, self.rows)])[: len(x)]


def gate_and_up(gate: Kind, up: Kind, dtype: torch.dtype, *, tile: int = 0) -> Linear | GatedInt4Linear:
    """Both as one linear, outputs side by side (see `settled`), or with the activation where kernels compute it too."""
    if isinstance(gate, Int4Linear) and isinstance(up, Int4Linear) and not tile:
        alike = gate.scales.shape == up.scales.shape
        if alike and ops.on_kernels(gate.qweight) and dtype in ops.HALVES:
            return GatedInt4Linear(gate, up)
    return settled(stack([gate, up]), dtype, tile=tile)


def reads_int8(linear: Linear) -> bool:
    """Whether its rows can be quantized by what comes before it."""
    return isinstance(linear.linear if isinstance(linear, TiledLinear) else linear, Int8Linear)


def forward_normed(
    linear: Linear, delta: Tensor | Part, hidden: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What `linear` makes of the RMS norm of total = hidden + delta [T, in], and total.

    Here is decided whether that is one operation, which takes one kernel where rows are few on a GPU: for int8 weights,
    and 4-bit ones in the order of a GPU's kernels. `TiledLinear` is none, so a deterministic model never depends on it.
    """
    if isinstance(linear, Int8Linear):
        return linear.forward_normed(whole(delta), hidden, norm, eps)
    if isinstance(linear, GatedInt4Linear) or (isinstance(linear, PackedInt4Linear) and not linear.on_cpu):
        # Where rows are many the product does not make the norm, and the kernel of a sum over ranks can.
        apart = isinstance(delta, Part) and not ops.norms_in_int4_linear(len(hidden))
        if not apart:
            return linear.forward_normed(whole(delta), hidden, norm, eps)
    if reads_int8(linear):
        values, scales, total = ops.add_rms_norm_int8(whole(delta), hidden, norm, eps)
        return linear.forward(Int8Rows(values, scales, total.dtype)), total
    normed, total = add_rms_norm(delta, hidden, norm, eps)
    return linear.forward(normed), total


Kind = DenseLinear | Int4Linear | Int8Linear


def read_linear(
    tensors: Mapping[str, Tensor], module: str, *, device: torch.device | str, dtype: torch.dtype, rotated: int = 0
) -> Kind:
    """The linear whose tensors are named `<module>.…`, of the kind whose tensors are there.

    Float tensors are cast to `dtype`, except scales, which keep what they store. `rotated` is `Int8Linear`'s.
    """
    bias = tensors[f"{module}.bias"].to(device, dtype) if f"{module}.bias" in tensors else None
    if f"{module}.qweight" in tensors:
        qweight, qzeros, scales = (tensors[f"{module}.{part}"].to(device) for part in ("qweight", "qzeros", "scales"))
        return Int4Linear(qweight, qzeros, scales, bias)
    if f"{module}.{names.WEIGHT_SCALE}" in tensors:
        weight, scales = (tensors[f"{module}.{part}"].to(device) for part in ("weight", names.WEIGHT_SCALE))
        return Int8Linear(weight, scales, bias, rotated=rotated)
    if f"{module}.weight" in tensors:
        return DenseLinear(tensors[f"{module}.weight"].to(device, dtype), bias)
    raise ValueError(f"no weight of {module}: neither {module}.weight nor {module}.qweight was given")


def stack(linears: Sequence[Kind]) -> Linear:
    """One linear that gives the outputs of `linears` side by side, by joining their weights along `out`.

    Linears that cannot be joined (different kinds, or different group sizes) stay apart behind one forward.
    """
    dense = [linear for linear in linears if isinstance(linear, DenseLinear)]
    if len(dense) == len(linears):
        weights = [linear.weight for linear in dense]
        return DenseLinear(torch.cat(weights), _join_biases(linears, [len(weight) for weight in weights]))
    packed = [linear for linear in linears if isinstance(linear, Int4Linear)]
    if len(packed) == len(linears) and len({len(linear.scales) for linear in packed}) == 1:
        return Int4Linear(
            torch.cat([linear.qweight for linear in packed], dim=1),
            torch.cat([linear.qzeros for linear in packed], dim=1),
            torch.cat([linear.scales for linear in packed], dim=1),
            _join_biases(linears, [linear.scales.shape[1] for linear in packed]),
        )
    int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
    if len(int8) == len(linears):
        return Int8Linear(
            torch.cat([linear.weight for linear in int8]),
            torch.cat([linear.scales for linear in int8]),
            _join_biases(linears, [len(linear.weight) for linear in int8]),
        )
    return MixedLinear(linears)


def settled(linear: Linear, dtype: torch.dtype, *, tile: int = 0) -> Linear:
    """A linear as it is kept to compute in `dtype`: in the order of the kernels of its device, and in tiles of so many
    rows where `tile` is not 0 and rows are not computed one by one anyway."""
    if isinstance(linear, MixedLinear):
        return MixedLinear([settled(one, dtype, tile=tile) for one in linear.linears])
    linear = linear.packed(dtype) if isinstance(linear, Int4Linear) else linear
    alone = isinstance(linear, PackedInt4Linear) and linear.on_cpu
    return TiledLinear(linear, tile) if tile and not alone else linear


def _join_biases(linears: Sequence[Kind], sizes: Sequence[int]) -> Tensor | None:
    known = [linear.bias for linear in linears if linear.bias is not None]
    if not known:
        return None
    return torch.cat(
        [
            linear.bias if linear.bias is not None else known[0].new_zeros(size)
            for linear, size in zip(linears, sizes, strict=True)
        ]
    )
