"""Every op of the decoder in plain torch: the CPU path, and the specification that faster kernels are tested against.

Whatever the type of the inputs, sums and exponentials are float32 and the result is rounded once to the input's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Nibble p of a packed word holds column AWQ_ORDER[p] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for [..., 2 * inner] with the gate in the first half; [..., inner]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, query_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turns the pairs (j, j + head_dim/2) of q, k [T, heads, head_dim] by the angles of cos, sin [T, head_dim/2].

    q is also multiplied by `query_scale` [T], where that is given.
    """
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    if query_scale is None:
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    scale = query_scale.float()[:, None, None]
    return _rotate(q, cos * scale, sin * scale), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [R, C] packed in AWQ order -> the int32 values 0..15 [R, 8 * C] in natural column order."""
    nibble_of_column = [AWQ_ORDER.index(column) for column in range(8)]
    shifts = torch.tensor(nibble_of_column, dtype=torch.int32, device=words.device) * 4
    return ((words[..., None] >> shifts) & 15).flatten(1)


def unpack_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """(q - z) * s as a dense float32 weight [out, in], from the AWQ layout.

    qweight int32 [in, out/8]; qzeros int32 [in/g, out/8]; scales float16 [in/g, out], g being the group size.
    """
    group_size = qweight.shape[0] // scales.shape[0]
    zeros = unpack_nibbles(qzeros).repeat_interleave(group_size, dim=0)
    steps = (unpack_nibbles(qweight) - zeros).float()
    return (steps * scales.float().repeat_interleave(group_size, dim=0)).t().contiguous()
