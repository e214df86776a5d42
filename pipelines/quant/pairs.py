"""What can be scaled without changing the model: a module whose outputs are divided, and linears that read them.

`x / s` out of `before` and `weight * s` (per input channel) in every linear of `after` cancel exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`before` is a norm or a linear, `after` the linears that read its output; names within a layer."""

    before: str
    after: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.before} -> {', '.join(self.after)}"


ATTENTION_IN = Pair(before="input_layernorm", after=("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"))
MLP_IN = Pair(before="post_attention_layernorm", after=("mlp.gate_proj", "mlp.up_proj"))
ATTENTION_OUT = Pair(before="self_attn.v_proj", after=("self_attn.o_proj",))
MLP_OUT = Pair(before="mlp.up_proj", after=("mlp.down_proj",))
# Norms first: their scaling changes v_proj and up_proj, which the other two divide.
PAIRS = (ATTENTION_IN, MLP_IN, ATTENTION_OUT, MLP_OUT)


def fold_heads(values: Tensor, config: ModelConfig) -> Tensor:
    """[heads * head_dim] -> [heads/kv_heads, kv_heads * head_dim]: the inputs of o_proj that one V channel feeds."""
    repeated = config.num_heads // config.num_kv_heads
    by_head = values.view(config.num_kv_heads, repeated, config.head_dim)
    return by_head.transpose(0, 1).reshape(repeated, config.num_kv_heads * config.head_dim)


def repeat_heads(values: Tensor, config: ModelConfig) -> Tensor:
    """[kv_heads * head_dim] -> [heads * head_dim]: a value per V channel at every input of o_proj that it feeds."""
    repeated = config.num_heads // config.num_kv_heads
    by_head = values.view(config.num_kv_heads, 1, config.head_dim).expand(-1, repeated, -1)
    return by_head.reshape(config.num_heads * config.head_dim)


def divide_outputs(tensors: Mapping[str, Tensor], module: str, scale: Tensor) -> dict[str, Tensor]:
    """The weight and bias of `module` with output channel j divided by scale[j], in the type they have."""
    divided: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        if (tensor := tensors.get(f"{module}.{part}")) is not None:
            column = scale.unsqueeze(-1) if tensor.dim() == 2 else scale
            divided[f"{module}.{part}"] = (tensor / column).to(tensor.dtype)
    return divided
