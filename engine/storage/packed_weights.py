"""Linears that are quantized already, in the two forms of Hugging Face checkpoints, to and from canonical tensors.

`awq`: our own layout, `qweight`, `qzeros`, `scales`. `compressed-tensors` (pack-quantized), for a weight [out, in]:
`weight_packed` int32 [out, in/8] and `weight_zero_point` int32 [out/8, in/g] (absent where symmetric: all 8) have codes
0..15 in natural order, eight to a word along inputs and outputs; `weight_scale` is [out, in/g]. A weight is
(code - zero) * scale in both.

8 bits (w8a8): `weight` int8 [out, in] and, [out, 1], `weight_scale` (compressed-tensors, int-quantized) or `scale`
(smooth_quant, LMDeploy's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from engine.models import names
from engine.models.quantization import PACKED, W8A8_OF_LMDEPLOY, Quantization
from engine.storage.int4_tiles import awq_from_packed, packed_from_awq
from engine.storage.turbomind_layout import pack_awq, pack_nibbles, unpack_awq, unpack_nibbles
from engine.storage.weight_files import WeightFile

Rows = Callable[[Tensor], Tensor]
SYMMETRIC_ZERO = 8
# Beside the weight of each module: its shape, and the group of each input where these were reordered.
SHAPE, ORDER = "weight_shape", "weight_g_idx"
EXTRAS = (f".{SHAPE}", f".{ORDER}")


WORDS, INT8 = "I32", "I8"
LMDEPLOY_SCALE = "scale"


def stored_kinds(
    quantization: Quantization, outputs: int, inputs: int
) -> dict[str, tuple[str, tuple[int, ...], str | None]]:
    """Canonical kind -> (stored kind, stored shape, type of its integers or None) of a linear [outputs, inputs].

    ValueError where groups, or the words of eight, do not come out even.
    """
    if quantization.int8:
        scale = names.WEIGHT_SCALE if quantization.method == PACKED else LMDEPLOY_SCALE
        return {"weight": ("weight", (outputs, inputs), INT8), names.WEIGHT_SCALE: (scale, (outputs, 1), None)}
    if inputs % quantization.group_size or inputs % 8 or outputs % 8:
        raise ValueError(
            f"a linear of {inputs} inputs and {outputs} outputs has no whole groups of {quantization.group_size} "
            "inputs, or no whole words of 8"
        )
    groups = inputs // quantization.group_size
    if quantization.method != PACKED:
        return {
            "qweight": ("qweight", (inputs, outputs // 8), WORDS),
            "qzeros": ("qzeros", (groups, outputs // 8), WORDS),
            "scales": ("scales", (groups, outputs), None),
        }
    scales = ("weight_scale", (outputs, groups), None)
    return {
        "qweight": ("weight_packed", (outputs, inputs // 8), WORDS),
        "qzeros": scales if quantization.symmetric else ("weight_zero_point", (outputs // 8, groups), WORDS),
        "scales": scales,
    }


def find_awq(files: Iterable[WeightFile], where: object) -> Quantization:
    """HF-AWQ of the group size that the shapes of the first linear give; ValueError where there is none."""
    shapes = {name: shape for file in files for name, (_, shape) in file.tensors.items()}
    for name, shape in shapes.items():
        scales = shapes.get(f"{name.removesuffix('qweight')}scales", ())
        if name.endswith(".qweight") and len(shape) == 2 and len(scales) == 2 and 0 < scales[0] <= shape[0]:
            return Quantization(method="awq", group_size=shape[0] // scales[0])
    raise ValueError(
        f"{where} holds no linear as qweight, qzeros and scales: it is no checkpoint in the HF-AWQ format, and its "
        "config.json has no quantization_config"
    )


def find_smooth_quant(files: Iterable[WeightFile]) -> Quantization | None:
    """LMDeploy's w8a8, told by an int8 weight with a scale beside it, as its `smooth_quant` leaves it; else None."""
    kinds = {name: kind for file in files for name, (kind, _) in file.tensors.items()}
    for name, kind in kinds.items():
        if kind == INT8 and name.endswith(".weight") and f"{name.removesuffix('weight')}{LMDEPLOY_SCALE}" in kinds:
            return W8A8_OF_LMDEPLOY
    return None


def reader(quantization: Quantization, kind: str, rows: Rows | None) -> Rows | None:
    """From a stored tensor to the canonical one of that kind; `rows` takes the rows of a module out of [out, ...]
    where several lie in one matrix. None: just as it is."""
    if quantization.int8:
        return partial(_row_scales, rows=rows) if kind == names.WEIGHT_SCALE else rows
    if quantization.method != PACKED and rows is None:
        return None
    return partial(_read, quantization=quantization, kind=kind, rows=rows)


def pack_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """The canonical tensors of a linear as pack-quantized ones, by stored kind; zero points are always written."""
    inputs, outputs = qweight.shape[0], scales.shape[1]
    zeros = unpack_awq(qzeros)
    return {
        "weight_packed": packed_from_awq(qweight),
        "weight_scale": scales.t().contiguous(),
        SHAPE: torch.tensor([outputs, inputs]),
        "weight_zero_point": pack_nibbles(zeros.reshape(-1, outputs // 8, 8)).t().contiguous(),
    }


def check_extras(
    files: Iterable[WeightFile], words: Mapping[str, tuple[int, ...]], quantization: Quantization
) -> set[str]:
    """The names of what lies beside packed weights, once it has been looked at: it says that they are plain groups.

    `words` are stored name and shape of the packed tensors. ValueError names what says something else.
    """
    known: set[str] = set()
    for file in files:
        packed = {name: f"{name.rpartition('.')[0]}.weight_packed" for name in file.tensors if name.endswith(EXTRAS)}
        packed = {name: weight for name, weight in packed.items() if weight in words}
        for name, tensor in file.read(packed).items():
            outputs, eighths = words[packed[name]]
            _check_extra(name, tensor, quantization, (outputs, eighths * 8))
        known |= packed.keys()
    return known


def _check_extra(name: str, tensor: Tensor, quantization: Quantization, shape: tuple[int, int]) -> None:
    if name.endswith(SHAPE):
        if tuple(tensor.tolist()) != shape:
            raise ValueError(f"{name} is {tensor.tolist()}; config.json asks for a weight of shape {list(shape)}")
        return
    plain = torch.arange(shape[1]) // quantization.group_size
    if tensor.shape != plain.shape or not torch.equal(tensor.long(), plain):
        raise ValueError(
            f"{name} deals the inputs to groups in another order than their own (actorder: group), and the int4 files "
            "of a TurboMind workspace have groups of neighbours: take a checkpoint with actorder weight, static or "
            "none, or quantize the unquantized one here (weights=w4a16)"
        )


def _row_scales(stored: Tensor, *, rows: Rows | None) -> Tensor:
    return (stored if rows is None else rows(stored)).float().flatten()


def _read(stored: Tensor, *, quantization: Quantization, kind: str, rows: Rows | None) -> Tensor:
    if quantization.method == PACKED and kind == "qweight":
        return awq_from_packed(stored if rows is None else rows(stored))
    matrix = _natural(stored, quantization, kind)
    matrix = (matrix if rows is None else rows(matrix)).t()
    return matrix.contiguous() if kind == "scales" else pack_awq(matrix)


def _natural(stored: Tensor, quantization: Quantization, kind: str) -> Tensor:
    """Codes, zero points (uint8) or scales as a matrix [out, in] or [out, groups]; not packed words of codes."""
    if quantization.method != PACKED:
        return (stored if kind == "scales" else unpack_awq(stored)).t()
    if kind == "scales":
        return stored
    if quantization.symmetric:
        return torch.full(stored.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
    return unpack_nibbles(stored.t()).flatten(-2).t()
