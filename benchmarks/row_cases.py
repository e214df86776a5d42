"""Cases of what is done to rows of hidden states: norms, the activation of the MLP, rounding to int8."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernel_registry import Case, Setting, implementations, register, values, with_rotation
from engine.config import ROTATIONS
from engine.kernels import reference

NORM, ACTIVATION, DRAW = (f"engine.kernels.{name}" for name in ("norm", "activation", "draw"))


@register("rms_norm")
def rms_norm(setting: Setting) -> Iterator[Case]:
    yield _norm(setting, "rms_norm", out_bytes=setting.dtype.itemsize)


@register("rms_norm_int8")
def rms_norm_int8(setting: Setting) -> Iterator[Case]:
    yield _norm(setting, "rms_norm_int8", out_bytes=1)


@register("add_rms_norm")
def add_rms_norm(setting: Setting) -> Iterator[Case]:
    """The norm of the residual stream with what is added to it, and the new stream."""
    tokens, hidden, item = setting.tokens, setting.config.hidden_size, setting.dtype.itemsize

    def plain(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return reference.rms_norm(total, weight, eps), total

    yield Case(
        kernel="add_rms_norm",
        size=f"{tokens}x{hidden}",
        inputs=lambda: (
            values(setting, tokens, hidden),
            values(setting, tokens, hidden),
            values(setting, hidden),
            setting.config.norm_eps,
        ),
        run={"reference": plain} | implementations("add_rms_norm", setting.device, NORM),
        bytes=4 * tokens * hidden * item + hidden * item,
    )


@register("silu_and_mul")
def silu_and_mul(setting: Setting) -> Iterator[Case]:
    yield _silu(setting, "silu_and_mul", out_bytes=setting.dtype.itemsize)


@register("silu_and_mul_int8")
def silu_and_mul_int8(setting: Setting) -> Iterator[Case]:
    case = _silu(setting, "silu_and_mul_int8", out_bytes=1)
    yield case
    if setting.config.intermediate_size % ROTATIONS[-1] == 0:
        yield with_rotation(case)


@register("quantize_rows")
def quantize_rows(setting: Setting) -> Iterator[Case]:
    """What the output projection reads under w8a8."""
    tokens, width = setting.tokens, setting.config.num_heads * setting.config.head_dim
    yield Case(
        kernel="quantize_rows",
        size=f"{tokens}x{width}",
        inputs=lambda: (values(setting, tokens, width),),
        run=implementations("quantize_rows", setting.device, ACTIVATION),
        bytes=tokens * width * (setting.dtype.itemsize + 1),
    )


@register("draw_tokens")
def draw_tokens(setting: Setting) -> Iterator[Case]:
    """Tokens from logits: the likeliest, by temperature alone, and narrowed by top-k and top-p."""
    tokens, vocabulary = setting.tokens, setting.config.vocab_size
    for name, numbers in {
        "likeliest": (0.0, 0, 1.0, 0.0, 0.5),
        "warm": (0.8, 0, 1.0, 0.0, 0.5),
        "narrowed": (0.8, 40, 0.95, 0.0, 0.5),
    }.items():

        def make(numbers: tuple[float, ...] = numbers) -> tuple[Tensor, Tensor]:
            logits = torch.randn(tokens, vocabulary, device=setting.device) * 3
            rows = torch.tensor([numbers] * tokens, dtype=torch.float64, device=setting.device)
            return logits, rows

        yield Case(
            kernel="draw_tokens",
            size=f"{tokens} of {vocabulary} {name}",
            inputs=make,
            run=implementations("draw_tokens", setting.device, DRAW, reference="engine.kernels.draw_reference"),
            bytes=tokens * vocabulary * 4,
            eager=("reference",),
        )


def _norm(setting: Setting, op: str, *, out_bytes: int) -> Case:
    tokens, hidden, item = setting.tokens, setting.config.hidden_size, setting.dtype.itemsize
    return Case(
        kernel=op,
        size=f"{tokens}x{hidden}",
        inputs=lambda: (values(setting, tokens, hidden), values(setting, hidden), setting.config.norm_eps),
        run=implementations(op, setting.device, NORM),
        bytes=tokens * hidden * (item + out_bytes) + hidden * item,
    )


def _silu(setting: Setting, op: str, *, out_bytes: int) -> Case:
    tokens, inner = setting.tokens, setting.config.intermediate_size
    return Case(
        kernel=op,
        size=f"{tokens}x{2 * inner}",
        inputs=lambda: (values(setting, tokens, 2 * inner),),
        run=implementations(op, setting.device, ACTIVATION),
        bytes=tokens * inner * (2 * setting.dtype.itemsize + out_bytes),
    )
