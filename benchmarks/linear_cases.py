"""Cases of the products of a layer: dense, int4 and int8 weights, by the kernels of a device and by references."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_registry import Case, Setting, implementations, register, values, with_rotation
from engine.config import ROTATIONS, ModelConfig
from engine.kernels import cpu_linear
from engine.kernels.int4_weights import Int4Weights
from engine.models import names

LINEARS = "engine.kernels.linear_reference"


@register("dense_linear")
def dense_linear(setting: Setting) -> Iterator[Case]:
    """The four products of a layer with dense weights; torch's own is what the others are compared with."""
    run = implementations("dense_linear", setting.device, "engine.kernels.dense_linear", reference=LINEARS)
    del run["reference"]  # torch's own product, but for its roundings
    run["torch"] = torch.nn.functional.linear
    for outputs, inputs in layer_products(setting.config):

        def make(outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            return values(setting, setting.tokens, inputs), values(setting, outputs, inputs)

        yield Case(
            kernel="dense_linear",
            size=f"{setting.tokens} of {outputs}x{inputs}",
            inputs=make,
            run=run,
            bytes=(outputs * inputs + setting.tokens * (outputs + inputs)) * setting.dtype.itemsize,
            operations=2 * setting.tokens * outputs * inputs,
        )


@register("int4_linear")
def int4_linear(setting: Setting) -> Iterator[Case]:
    """The same with int4 weights in the order of the tensor cores, or of a CPU's C kernels, for which there is no
    reference; bytes are those of the packed weights."""
    on_cpu = setting.device == "cpu" and cpu_linear.has_int4()
    run = implementations("int4_linear", setting.device, "engine.kernels.int4_linear", reference=LINEARS)
    if on_cpu:
        run = {"cpu_linear": cpu_linear.int4_linear}
    layout = cpu_linear.CpuInt4Weights if on_cpu else Int4Weights
    for outputs, inputs in layer_products(setting.config):
        if inputs % setting.group_size:
            continue

        def make(outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            return values(setting, setting.tokens, inputs), layout.pack(*_packed(setting, outputs, inputs))

        groups = inputs // setting.group_size
        yield Case(
            kernel="int4_linear",
            size=f"{setting.tokens} of {outputs}x{inputs} g{setting.group_size}",
            inputs=make,
            run=run,
            bytes=outputs * inputs // 2
            + groups * outputs * 4
            + setting.tokens * (outputs + inputs) * setting.dtype.itemsize,
            operations=2 * setting.tokens * outputs * inputs,
        )


@register("gated_int4_linear")
def gated_int4_linear(setting: Setting) -> Iterator[Case]:
    """int4 gate and up with silu * up in the same kernel."""
    outputs, inputs = 2 * setting.config.intermediate_size, setting.config.hidden_size
    if inputs % setting.group_size == 0:
        yield Case(
            kernel="gated_int4_linear",
            size=f"{setting.tokens} of {outputs}x{inputs} g{setting.group_size}",
            inputs=lambda: (
                values(setting, setting.tokens, inputs),
                Int4Weights.pack(*_packed(setting, outputs, inputs)),
            ),
            run=implementations("gated_int4_linear", setting.device, "engine.kernels.int4_linear", reference=LINEARS),
            bytes=outputs * inputs // 2
            + inputs // setting.group_size * outputs * 4
            + setting.tokens * (outputs // 2 + inputs) * setting.dtype.itemsize,
            operations=2 * setting.tokens * outputs * inputs,
        )


@register("normed_int4_linear")
def normed_int4_linear(setting: Setting) -> Iterator[Case]:
    """int4 q, k and v, and gate and up, of the norm of the residual stream; `apart` takes a kernel for the norm."""
    run = implementations("normed_int4_linear", setting.device, "engine.kernels.normed_linear", reference=LINEARS)
    if "normed_linear" in run:
        run["apart"] = functools.partial(run["normed_linear"], bias=None, config={"kernel": "apart"})
    hidden, item = setting.config.hidden_size, setting.dtype.itemsize
    for outputs, inputs in layer_products(setting.config)[::2]:
        if inputs % setting.group_size:
            continue

        def make(outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            delta, residual, norm = (values(setting, *size) for size in ((setting.tokens, hidden),) * 2 + ((hidden,),))
            packed = Int4Weights.pack(*_packed(setting, outputs, inputs))
            return delta, residual, norm, setting.config.norm_eps, packed

        yield Case(
            kernel="normed_int4_linear",
            size=f"{setting.tokens} of {outputs}x{inputs} g{setting.group_size}",
            inputs=make,
            run=run,
            bytes=outputs * inputs // 2
            + inputs // setting.group_size * outputs * 4
            + (setting.tokens * (3 * hidden + outputs) + hidden) * item,
            operations=2 * setting.tokens * outputs * inputs,
        )


@register("int4_unpack")
def int4_unpack(setting: Setting) -> Iterator[Case]:
    """int4 groups to a dense weight, which the CPU path does once."""
    for outputs, inputs in layer_products(setting.config):
        if inputs % setting.group_size:
            continue

        def make(outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            return _packed(setting, outputs, inputs)

        groups = inputs // setting.group_size
        yield Case(
            kernel="int4_unpack",
            size=f"{outputs}x{inputs} g{setting.group_size}",
            inputs=make,
            run=implementations("unpack_int4", setting.device),
            bytes=outputs * inputs // 2 + groups * outputs * 5 // 2 + outputs * inputs * 4,
        )


@register("int8_linear")
def int8_linear(setting: Setting) -> Iterator[Case]:
    run = implementations("int8_linear", setting.device, "engine.kernels.int8_linear")
    if setting.device == "cpu" and cpu_linear.functions() is not None:
        run["cpu_linear"] = cpu_linear.int8_linear
    for outputs, inputs in layer_products(setting.config):

        def make(outputs: int = outputs, inputs: int = inputs) -> tuple[Any, ...]:
            x, weight = (
                torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, device=setting.device)
                for rows in (setting.tokens, outputs)
            )
            scales = (torch.rand(rows, device=setting.device) / inputs for rows in (setting.tokens, outputs))
            return x, next(scales), weight, next(scales), None, setting.dtype

        yield Case(
            kernel="int8_linear",
            size=f"{setting.tokens} of {outputs}x{inputs}",
            inputs=make,
            run=run,
            bytes=outputs * inputs + setting.tokens * (inputs + outputs * setting.dtype.itemsize),
            operations=2 * setting.tokens * outputs * inputs,
            int8=True,
        )


@register("normed_int8_linear")
def normed_int8_linear(setting: Setting) -> Iterator[Case]:
    """int8 q, k and v, and gate and up, of the norm of the residual stream; `apart` takes a kernel for the norm."""
    for outputs, inputs in layer_products(setting.config)[::2]:
        yield _made_int8(setting, "normed_int8_linear", outputs, inputs, streams=2)


@register("rounded_int8_linear")
def rounded_int8_linear(setting: Setting) -> Iterator[Case]:
    """int8 o of what attention gives; `apart` takes a kernel for the rounding."""
    yield _made_int8(setting, "rounded_int8_linear", *layer_products(setting.config)[1], streams=0)


@register("gated_int8_linear")
def gated_int8_linear(setting: Setting) -> Iterator[Case]:
    """int8 down of silu(gate) * up, as it is and rotated; `apart` takes a kernel for that."""
    outputs, inputs = layer_products(setting.config)[3]
    case = _made_int8(setting, "gated_int8_linear", outputs, inputs, streams=0, parts=2)
    yield case
    if inputs % ROTATIONS[-1] == 0:
        yield with_rotation(case)


def _made_int8(setting: Setting, op: str, outputs: int, inputs: int, *, streams: int, parts: int = 1) -> Case:
    """A product that makes its int8 rows, of two `streams` and a norm or of rows of floats in `parts`."""
    run = implementations(op, setting.device, "engine.kernels.normed_linear", reference=LINEARS)
    if "normed_linear" in run:
        run["apart"] = functools.partial(run["normed_linear"], bias=None, config={"kernel": "apart"})

    def make() -> tuple[Any, ...]:
        rows = [values(setting, setting.tokens, parts * inputs) for _ in range(max(streams, 1))]
        norm = (values(setting, inputs), setting.config.norm_eps) if streams else ()
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=setting.device)
        return *rows, *norm, weight, torch.rand(outputs, device=setting.device) / inputs

    read = (setting.tokens * 3 + 1) * inputs if streams else setting.tokens * parts * inputs
    return Case(
        kernel=op,
        size=f"{setting.tokens} of {outputs}x{inputs}",
        inputs=make,
        run=run,
        bytes=outputs * inputs + (read + setting.tokens * outputs) * setting.dtype.itemsize,
        operations=2 * setting.tokens * outputs * inputs,
        int8=True,
    )


def layer_products(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of the four products of a layer: q, k and v, and gate and up, as one each."""

    def of(*modules: str) -> tuple[int, int]:
        shapes = [names.linear_shape(config, module) for module in modules]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    return [of(*names.QKV), of(names.OUTPUT), of(*names.GATE_UP), of(names.DOWN)]


def _packed(setting: Setting, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, qzeros and scales in the AWQ layout."""
    groups = inputs // setting.group_size
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, (rows, outputs // 8), dtype=torch.int32, device=setting.device)
        for rows in (inputs, groups)
    )
    return qweight, qzeros, torch.rand(groups, outputs, device=setting.device).half() * 0.01
