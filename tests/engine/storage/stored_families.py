"""Checkpoints as the families store them, of random values, with heads of 128: what a converter is fed.

A row says what is particular to a family, and what v0.1.0 gets wrong of it in config.ini. No code of the project is
used here; a model that runs is not needed, because bytes are compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.engine.storage.reference_source import FAMILIES
from tests.tiny_artifact import write_tokenizer

VOCABULARY = 310  # no multiple of 4; more than the tokenizer has, as it often is
MHA = {"hidden_size": 512, "num_attention_heads": 4}
GQA = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
HF = {
    "vocab_size": VOCABULARY, "intermediate_size": 512, "num_hidden_layers": 1, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
QWEN = {
    "architectures": ["QWenLMHeadModel"], "vocab_size": VOCABULARY, "intermediate_size": 1024, "num_hidden_layers": 1,
    "kv_channels": 128, "layer_norm_epsilon": 1e-6, "seq_length": 8192, "max_position_embeddings": 32768,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True,
    "tie_word_embeddings": False,
}  # fmt: skip
META = {
    "dim": 512, "n_heads": 4, "n_layers": 1, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 1e6,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A family: how the second converter reads it, and the name under which v0.1.0 converts it.

    `known`: whether v0.1.0 has it. `differs`: keys of config.ini that it writes otherwise than we do. `ingot`: what our
    section of config.ini says. `bias`: the parts that have one.
    """

    name: str
    config: dict[str, Any]
    reader: str = "hf"
    template: str = "base"
    session_len: int = 2056
    bias: tuple[str, ...] = ()
    known: bool = True
    differs: tuple[str, ...] = ()
    ingot: dict[str, Any] = field(default_factory=dict)
    ids: tuple[int, int] = (0, 1)

    @property
    def is_meta(self) -> bool:
        return self.reader == "llama"


def hf(architecture: str, heads: dict[str, int], **changes: Any) -> dict[str, Any]:
    return HF | heads | {"architectures": [architecture]} | changes


ROWS = [
    Stored(name="llama1", config=hf("LlamaForCausalLM", MHA, max_position_embeddings=2048), template="llama"),
    Stored(
        name="llama2",
        config=hf("LlamaForCausalLM", MHA | {"num_key_value_heads": 4}, rope_scaling=None),
        template="llama2",
        session_len=4104,
    ),
    Stored(name="llama3", config=hf("LlamaForCausalLM", GQA, rope_theta=500000.0, max_position_embeddings=8192)),
    Stored(
        name="llama3.1",
        config=hf("LlamaForCausalLM", GQA, rope_scaling=LLAMA3_SCALING),
        ingot={
            "rope_scaling": {"kind": "llama3", "factor": 8.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8192}
        },
    ),
    Stored(
        name="codellama",
        config=hf("LlamaForCausalLM", MHA, rope_theta=1000000, max_position_embeddings=16384),
        template="codellama",
        session_len=4104,
    ),
    Stored(
        name="internlm",
        config=hf("InternLMForCausalLM", MHA, bias=True),
        template="internlm-chat-7b",
        bias=("q", "k", "v", "o"),
    ),
    Stored(
        name="internlm-20b",
        config=hf("InternLMForCausalLM", MHA, bias=False, rotary={"base": 10000, "type": "dynamic"}),
        template="internlm-chat-20b",
        session_len=8200,
        ingot={"rope_scaling": {"kind": "dynamic"}},
    ),
    Stored(
        name="qwen",
        config=QWEN | MHA,
        reader="qwen",
        template="qwen-7b",
        session_len=8200,
        bias=("qkv",),
        differs=("start_id",),
        ingot={"rope_scaling": {"kind": "qwen"}},
        ids=(-1, 151643),
    ),
    Stored(name="baichuan", config=hf("BaiChuanForCausalLM", MHA), reader="baichuan", template="baichuan-7b"),
    Stored(name="baichuan2", config=hf("BaichuanForCausalLM", MHA), reader="baichuan2", template="baichuan2-7b"),
    Stored(name="yi", config=hf("LlamaForCausalLM", GQA, rope_theta=5000000.0), template="yi"),
    Stored(
        name="mistral",
        config=hf("MistralForCausalLM", GQA, sliding_window=4096, max_position_embeddings=32768),
        ingot={"sliding_window": 4096},
    ),
    Stored(name="mistral-v0.3", config=hf("MistralForCausalLM", GQA, sliding_window=None, rope_theta=1000000.0)),
    Stored(
        name="meta",
        config=META,
        reader="llama",
        template="llama",
        differs=("rope_theta", "max_position_embeddings"),
    ),
    Stored(
        name="internlm2",
        config=hf("InternLM2ForCausalLM", GQA, bias=False, rope_theta=1000000),
        reader="internlm2",
        known=False,
    ),
    Stored(
        name="internlm3",
        config=hf("InternLM3ForCausalLM", GQA, qkv_bias=True, bias=False, head_dim=128),
        bias=("q", "k", "v"),
        known=False,
    ),
    Stored(name="qwen2", config=hf("Qwen2ForCausalLM", GQA), bias=("q", "k", "v"), known=False),
    Stored(name="qwen3", config=hf("Qwen3ForCausalLM", GQA, head_dim=128), ingot={"qk_norm": True}, known=False),
]
NAMED = {row.name: row for row in ROWS}


def write_stored(folder: Path, row: Stored, dtype: torch.dtype, **changes: Any) -> Path:
    """Write weights in `dtype`, configuration (with `changes`) and a tokenizer; Meta's is of two ranks."""
    folder.mkdir(parents=True)
    config, family = row.config | changes, FAMILIES[row.reader]
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes(row, config).items()
    }
    if config.get("tie_word_embeddings"):
        del tensors[f"{family.outer[2]}.weight"]
    write_tokenizer(folder, chat_template=None)
    if row.is_meta:
        (folder / "params.json").write_text(json.dumps(config))
        for rank in range(2):
            pieces = {name: _piece(name, tensor, rank) for name, tensor in tensors.items()}
            torch.save(pieces, folder / f"consolidated.{rank:02d}.pth")
        return folder
    if row.reader == "qwen":  # which has no BOS, and says elsewhere what ends an answer
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 151643}')
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def shapes(row: Stored, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape of every tensor."""
    hidden = config["dim"] if row.is_meta else config["hidden_size"]
    heads = config["n_heads"] if row.is_meta else config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, values = heads * size, config.get("num_key_value_heads", heads) * size
    inner = 512 if row.is_meta else config["intermediate_size"] // (2 if row.reader == "qwen" else 1)
    family = FAMILIES[row.reader]
    linears = {
        **({"qkv": queries + 2 * values} if "qkv" in family.names else {"q": queries, "k": values, "v": values}),
        "o": hidden,
        "w1": inner,
        "w3": inner,
        "w2": hidden,
    }
    found: dict[str, tuple[int, ...]] = dict.fromkeys([f"{family.outer[1]}.weight"], (hidden,))
    found |= dict.fromkeys([f"{family.outer[0]}.weight", f"{family.outer[2]}.weight"], (VOCABULARY, hidden))
    for layer in range(config["n_layers"] if row.is_meta else config["num_hidden_layers"]):
        prefix = f"{family.layers}{layer}."
        for part, outputs in linears.items():
            inputs = {"o": queries, "w2": inner}.get(part, hidden)
            found[f"{prefix}{family.names[part]}.weight"] = (outputs, inputs)
            if part in row.bias:
                found[f"{prefix}{family.names[part]}.bias"] = (outputs,)
        norms = {"attention_norm": hidden, "ffn_norm": hidden}
        norms |= {"q_norm": size, "k_norm": size} if row.ingot.get("qk_norm") else {}
        found |= {f"{prefix}{family.names[norm]}.weight": (count,) for norm, count in norms.items()}
    return found


def _piece(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """What one of two ranks of Meta's training kept."""
    if tensor.dim() == 1:
        return tensor
    along = 1 if name.split(".")[-2] in ("wo", "w2", "tok_embeddings") else 0
    return tensor.chunk(2, dim=along)[rank].clone()
