"""Tables of the rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig


def rope_tables(config: ModelConfig, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of position / theta^(2j/head_dim) for the pairs j < head_dim/2: each [T, head_dim/2] in `dtype`.

    Angles are float32, as models are trained with: at position 32768 they are up to 0.004 away from exact ones,
    and "better" ones would move logits away from every other implementation.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
