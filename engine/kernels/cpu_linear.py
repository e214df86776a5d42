"""int4 and int8 products on a CPU, by the C code of `c/linear.c`.

int4 weights are multiplied in float32 with activations as they are: `reference.unpack_int4` and a product, but for the
order of its sums. int8 results are those of `reference.int8_linear` to the bit, and so INGOT_C_KERNELS=exact, which
fixes what is computed whether there is a compiler or not, leaves them on. INGOT_C_KERNELS=none is torch alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.kernels import c_library

logger = logging.getLogger(__name__)

TILE_ROWS = 64
SCALE_BYTES = 3
INT8_PADDING = 32
# Inputs up to which no sum of int8 products can leave int32, moved up by 128 too.
MOST_INT8_INPUTS = 65536
# The environment variable that says which kernels may run: all, unless it is one of these.
SWITCH, NONE, EXACT = "INGOT_C_KERNELS", "none", "exact"
# Multiplied pairs that are worth waking a thread.
PAIRS_PER_THREAD = 1 << 19

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "int4_linear": (*[ctypes.c_void_p] * 5, *[ctypes.c_long] * 3, *[ctypes.c_int] * 2, ctypes.c_void_p),
    "int4_pack": (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 2, *[ctypes.c_int] * 2, ctypes.c_void_p),
    "int8_linear": (*[ctypes.c_void_p] * 7, *[ctypes.c_long] * 3, ctypes.c_int, ctypes.c_void_p),
}


class Functions:
    """The functions of the library, run by the threads of the OpenMP pool that torch has; by one where it has none."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: getattr(library, name) for name in ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = ARGUMENTS[name], None
        try:
            # A runtime of our own would have threads that fight with torch's for the processor.
            self._parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
        except (AttributeError, OSError):
            self._parallel = None

    def call(self, name: str, *arguments: Any, pairs: int) -> None:
        """`arguments` are numbers, tensors (contiguous, of the types that the C code says), or None."""
        threads = min(torch.get_num_threads(), 1 + pairs // PAIRS_PER_THREAD) if self._parallel else 1
        plain = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
        self._functions[name](*plain, threads, self._parallel)


@cache
def functions() -> Functions | None:
    """None where INGOT_C_KERNELS=none, or where they cannot be compiled, of which a warning tells, once."""
    if os.environ.get(SWITCH) == NONE:
        return None
    try:
        library = c_library.library()
    except c_library.NotCompiled as error:
        logger.warning("CPU kernels: torch's (%s); int4 weights are unpacked to floats, and int8 is slower", error)
        return None
    return Functions(library)


@dataclass(frozen=True)
class CpuInt4Weights:
    """A weight [out_features, in_features] of (q - z) * s with a float16 s for each `group_size` inputs.

    packed: uint8, for each 64 outputs (the last ones padded) and each group a record: int32 words [group_size/8, 64],
    whose nibble i is the q of input 8 * row + i; float16 s [64]; bytes z [64].
    """

    packed: Tensor
    out_features: int
    in_features: int
    group_size: int

    @classmethod
    def pack(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> CpuInt4Weights:
        """From the AWQ layout (see `reference.unpack_int4`)."""
        inputs, outputs = qweight.shape[0], scales.shape[1]
        group_size = inputs // len(scales)
        record = TILE_ROWS * (group_size // 2 + SCALE_BYTES)
        packed = torch.empty(-(-outputs // TILE_ROWS) * len(scales) * record, dtype=torch.uint8)
        source = (qweight.contiguous(), qzeros.contiguous(), scales.half().contiguous())
        _call("int4_pack", *source, packed, outputs, inputs, group_size, pairs=outputs * inputs)
        return cls(packed, outputs, inputs, group_size)


def packs_int4(qweight: Tensor, scales: Tensor) -> bool:
    """Whether there is a kernel for these weights, in the AWQ layout: on a CPU, in groups of a multiple of 8."""
    fits = qweight.shape[0] % (8 * len(scales)) == 0 and scales.shape[1] % 8 == 0 and qweight.numel() > 0
    return qweight.device.type == "cpu" and fits and has_int4()


def has_int4() -> bool:
    """Whether int4 weights are multiplied as they are packed here."""
    return os.environ.get(SWITCH) != EXACT and functions() is not None


def int4_linear(x: Tensor, weights: CpuInt4Weights, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x [..., in] of any float type; [..., out] of x's type. Computed in float32, W not rounded.

    A row's result does not depend on the rows beside it, nor on the number of threads.
    """
    rows = x.reshape(-1, weights.in_features).float().contiguous()
    groups = weights.in_features // weights.group_size
    out = torch.empty(len(rows), weights.out_features)
    scratch = torch.empty(len(rows) * (weights.in_features + groups))
    shape = (len(rows), weights.out_features, weights.in_features, weights.group_size)
    bias = None if bias is None else bias.float()
    _call("int4_linear", rows, weights.packed, bias, out, scratch, *shape, pairs=out.numel() * weights.in_features)
    return out.to(x.dtype).view(*x.shape[:-1], weights.out_features)


def int8_linear(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.int8_linear`, the same bits, for what `multiplies_int8` says."""
    out = torch.empty(len(x), len(weight))
    bias = None if bias is None else bias.float()
    _int8(x, x_scales.contiguous(), weight, weight_scales.contiguous(), bias, out)
    return out.to(dtype)


def int8_products(x: Tensor, weight: Tensor) -> Tensor:
    """`reference.int8_products`, for what `multiplies_int8` says."""
    out = torch.empty(len(x), len(weight), dtype=torch.int32)
    _int8(x, None, weight, None, None, out)
    return out


def _int8(
    x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    scratch = torch.empty(2 * len(x) * (x.shape[1] + INT8_PADDING), dtype=torch.int8)
    source = (x.contiguous(), x_scales, weight, scales, bias)
    _call("int8_linear", *source, out, scratch, len(x), *weight.shape, pairs=out.numel() * x.shape[1])


def multiplies_int8(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for these rows and weights."""
    fits = x.device.type == "cpu" and weight.is_contiguous() and 0 < x.shape[1] <= MOST_INT8_INPUTS
    return fits and functions() is not None


def _call(name: str, *arguments: Any, pairs: int) -> None:
    known = functions()
    assert known is not None, "there are no compiled kernels"
    known.call(name, *arguments, pairs=pairs)
