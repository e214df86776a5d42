"""A tiny Qwen v1 checkpoint, and its logits in float64 from the architecture's public definition."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

Logits = Callable[[list[int]], Tensor]
Tensors = dict[str, Tensor]

QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "seq_length": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "use_flash_attn": "auto",
    "bf16": True,
    "fp16": False,
    "fp32": False,
    "onnx_safe": None,
    "emb_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "softmax_in_fp32": False,
    "use_cache_quantization": False,
    "use_cache_kernel": False,
    "tie_word_embeddings": False,
}


def write_qwen(folder: Path, dtype: torch.dtype) -> Logits:
    shapes = {"transformer.wte.weight": (70, 64), "transformer.ln_f.weight": (64,), "lm_head.weight": (70, 64)}
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        shapes |= {
            f"{prefix}ln_1.weight": (64,),
            f"{prefix}attn.c_attn.weight": (192, 64),
            f"{prefix}attn.c_attn.bias": (192,),
            f"{prefix}attn.c_proj.weight": (64, 64),
            f"{prefix}ln_2.weight": (64,),
            f"{prefix}mlp.w1.weight": (40, 64),
            f"{prefix}mlp.w2.weight": (40, 64),
            f"{prefix}mlp.c_proj.weight": (64, 40),
        }
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) * 1.5 * shape[-1] ** -0.5 for name, shape in shapes.items()
    }
    tensors = {name: (x + 1 if "ln_" in name else x).to(dtype) for name, x in tensors.items()}
    write_files(folder, QWEN, tensors, dtype)
    return lambda token_ids: qwen_logits({name: x.double() for name, x in tensors.items()}, token_ids)


def qwen_logits(weights: Tensors, token_ids: list[int]) -> Tensor:
    """Qwen v1 in float64 for a whole prompt, heads of 16 and a trained length of 16."""
    length, heads, dim, trained = len(token_ids), 4, 16, 16
    stretch = max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1)
    base = 10000 * stretch ** (dim / (dim - 2))
    angle = torch.arange(length).double()[:, None] / base ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (angle.cos(), angle.sin()))
    logn = torch.tensor([max(math.log(t, trained), 1) for t in range(1, length + 1)], dtype=torch.float64)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1) * sin

    hidden = weights["transformer.wte.weight"][token_ids]
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        mixed = norm(hidden, f"{prefix}ln_1.weight") @ weights[f"{prefix}attn.c_attn.weight"].T
        query, key, value = (mixed + weights[f"{prefix}attn.c_attn.bias"]).view(length, 3, heads, dim).unbind(1)
        query, key = turn(query) * logn[:, None, None], turn(key)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", scores, value).reshape(length, heads * dim)
        hidden = hidden + attended @ weights[f"{prefix}attn.c_proj.weight"].T
        normed = norm(hidden, f"{prefix}ln_2.weight")
        inner = (normed @ weights[f"{prefix}mlp.w1.weight"].T) * silu(normed @ weights[f"{prefix}mlp.w2.weight"].T)
        hidden = hidden + inner @ weights[f"{prefix}mlp.c_proj.weight"].T
    return (norm(hidden, "transformer.ln_f.weight") @ weights["lm_head.weight"].T).float()


def write_files(folder: Path, config: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.detach().to(dtype).contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
