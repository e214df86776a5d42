"""How checkpoints of the families name and pack their tensors: a table, read by the checkpoint's door. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.models import names


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the tensors of a checkpoint lie, as far as that differs from Hugging Face's Llama.

    - `modules`: our name of a module within a layer -> the stored one.
    - `qkv`: q, k and v are matrices of their own, or rows of the one that all three name: `stacked` is all of q, then
      k, then v; `per_kv_head` is, for each KV head, its queries' heads, then its k, then its v.
    - `rotary`: rows of q and k pair j with j + head_dim/2 (`half`), or 2j with 2j + 1 (`adjacent`).
    - `unit_head`: the output matrix is used with every row divided by its length.
    - `ignored`: ends of names of stored buffers that every reader recomputes.
    """

    embedding: str = names.EMBEDDING
    final_norm: str = names.FINAL_NORM
    head: str = names.HEAD
    layer_prefix: str = names.LAYER_PREFIX
    modules: Mapping[str, str] = field(default_factory=dict)
    qkv: Literal["apart", "stacked", "per_kv_head"] = "apart"
    rotary: Literal["half", "adjacent"] = "half"
    unit_head: bool = False
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


HUGGING_FACE = Layout()

BAICHUAN = Layout(modules=dict.fromkeys(names.QKV, "self_attn.W_pack"), qkv="stacked")
BAICHUAN2 = Layout(modules=BAICHUAN.modules, qkv="stacked", unit_head=True)

INTERNLM2 = Layout(
    embedding="model.tok_embeddings.weight",
    head="output.weight",
    modules={
        "input_layernorm": "attention_norm",
        **dict.fromkeys(names.QKV, "attention.wqkv"),
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    },
    qkv="per_kv_head",
)

QWEN = Layout(
    embedding="transformer.wte.weight",
    final_norm="transformer.ln_f.weight",
    layer_prefix="transformer.h.",
    modules={
        "input_layernorm": "ln_1",
        **dict.fromkeys(names.QKV, "attn.c_attn"),
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    },
    qkv="stacked",
)

META = Layout(
    embedding="tok_embeddings.weight",
    final_norm="norm.weight",
    head="output.weight",
    layer_prefix="layers.",
    modules={
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    },
    rotary="adjacent",
    ignored=("rope.freqs", "attention.inner_attention.rope.freqs"),
)
