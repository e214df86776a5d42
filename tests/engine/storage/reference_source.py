"""The reading half of the second converter: the families' own names, and linears as `[in, out]` matrices.

Written from the published facts of LMDeploy v0.1.0 and of the families, without the project's code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]
# Stored name of each linear and norm of a layer; `qkv` where the three are one matrix.
HF = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
BAICHUAN = HF | {"qkv": "self_attn.W_pack"}
QWEN = {
    "qkv": "attn.c_attn", "o": "attn.c_proj", "w1": "mlp.w2", "w3": "mlp.w1", "w2": "mlp.c_proj",
    "attention_norm": "ln_1", "ffn_norm": "ln_2",
}  # fmt: skip
META = {
    "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "w1": "feed_forward.w1", "w3": "feed_forward.w3", "w2": "feed_forward.w2",
    "attention_norm": "attention_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
INTERNLM2 = META | {"qkv": "attention.wqkv"}
OUTER = ("model.embed_tokens", "model.norm", "lm_head")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family's tensors lie: names in a layer, its prefix, and embedding, last norm and output."""

    names: dict[str, str]
    layers: str = "model.layers."
    outer: tuple[str, str, str] = OUTER
    packed: str = "thirds"
    adjacent: bool = False
    unit_head: bool = False


FAMILIES = {
    "hf": Family(names=HF),
    "baichuan": Family(names=BAICHUAN),
    "baichuan2": Family(names=BAICHUAN, unit_head=True),
    "qwen": Family(names=QWEN, layers="transformer.h.", outer=("transformer.wte", "transformer.ln_f", "lm_head")),
    "llama": Family(names=META, layers="layers.", outer=("tok_embeddings", "norm", "output"), adjacent=True),
    # Not in v0.1.0.
    "internlm2": Family(names=INTERNLM2, outer=("model.tok_embeddings", "model.norm", "output"), packed="heads"),
}


class Source:
    """Tensors of a folder by stored name, and single linears in `[in, out]`."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.family = family
        meta = not (folder / "config.json").exists()
        self.config = json.loads((folder / ("params.json" if meta else "config.json")).read_text())
        self.tensors = _joined(folder, self.config["dim"]) if meta else load_file(folder / "model.safetensors")

    def get(self, layer: int, part: str, kind: str) -> Tensor | None:
        """`[in, out]`, a bias `[1, out]`; codes and zero points as numbers 0..15; None where there is none."""
        names, prefix = self.family.names, f"{self.family.layers}{layer}."
        together = part in ("q", "k", "v") and "qkv" in names
        stored = self.tensors.get(f"{prefix}{names['qkv' if together else part]}.{kind}")
        if stored is None:
            return None
        if kind in ("qweight", "qzeros"):
            matrix = _awq(stored)
        else:
            matrix = stored.T if kind == "weight" else stored[None] if kind == "bias" else stored
        if not together:
            return matrix
        columns = torch.arange(matrix.shape[1])
        if self.family.packed == "thirds":
            return matrix[:, columns // (matrix.shape[1] // 3) == "qkv".index(part)]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        group, size = heads // kv_heads, matrix.shape[1] // (heads + 2 * kv_heads)
        place = columns // size % (group + 2)
        return matrix[:, {"q": place < group, "k": place == group, "v": place == group + 1}[part]]


def _awq(words: Tensor) -> Tensor:
    """int32 [rows, M/8] -> [rows, M]: column e of eight is in nibble (0, 4, 1, 5, 2, 6, 3, 7)[e]."""
    shifts = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    return (words.long()[:, :, None] >> shifts & 15).reshape(words.shape[0], -1)


def _joined(folder: Path, hidden: int) -> Tensors:
    """Meta's ranks as whole tensors: rows of wq, wk, wv, w1, w3 and output, columns of wo and w2."""
    ranks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    joined = dict(ranks[0])
    for name, tensor in ranks[0].items():
        stem = name.split(".")[-2]
        if stem in ("wo", "w2") or (stem == "tok_embeddings" and tensor.shape[1] != hidden):
            joined[name] = torch.cat([rank[name] for rank in ranks], dim=1)
        elif "norm" not in stem and tensor.dim() == 2:
            joined[name] = torch.cat([rank[name] for rank in ranks], dim=0)
    return joined
