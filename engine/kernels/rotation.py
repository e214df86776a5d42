"""Channels rotated by small blocks before they are rounded to int8; plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, block: int) -> Tensor:
    """Every `block` neighbouring channels of x [..., in] times Sylvester's Hadamard matrix of that size, divided by its
    root: orthogonal, and its own inverse. In float64 where x is that, else in float32; 0 leaves x as it is.

    A channel that is large alone becomes `block` channels that are less large, so that int8 rows are finer (the online
    transform of QuaRot, Ashkboos et al. 2024, section 4.1, by blocks).
    """
    if not block:
        return x
    wide, size = x if x.dtype == torch.float64 else x.float(), 1
    while size < block:
        left, right = torch.unflatten(wide, -1, (x.shape[-1] // (2 * size), 2, size)).unbind(-2)
        wide = torch.stack((left + right, left - right), dim=-2).reshape(x.shape)
        size *= 2
    rotated: Tensor = wide * block**-0.5
    return rotated
