"""A tiny random checkpoint of every family, each with a model that is not ours to say its logits.

Where transformers has the class, it writes the checkpoint. Where it has not, its Llama or Qwen2 is taken apart and put
together as the family stores it; Qwen v1, whose attention no class has, is in `tiny_qwen`. Over 300 lines because a
family is a row here, as it is in the table that it tests.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    InternLM3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engine.storage.tiny_qwen import Logits, Tensors, write_files, write_qwen

SHAPE = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
}
MHA = {"num_key_value_heads": 4}
PROMPT = torch.randint(3, 70, (40,), generator=torch.Generator().manual_seed(5)).tolist()


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """`write(folder, dtype)` writes the checkpoint and returns what says its logits.

    `matters` are changes of ModelConfig that must change the logits: what the family is known for is at work.
    """

    name: str
    write: Callable[[Path, torch.dtype], Logits]
    matters: dict[str, Any] = field(default_factory=dict)
    allow_bin: bool = False


def randomized(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights of a size at which attention is far from uniform, representable in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            drawn = drawn * 0.5 if name.endswith("bias") else 1 + 0.3 * drawn
        else:
            drawn = drawn * 1.5 * weight.shape[-1] ** -0.5
        weight.data = drawn.to(dtype).float()
    return model.eval()


def says(model: torch.nn.Module) -> Logits:
    def logits(token_ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([token_ids])).logits[0]

    return logits


def of_transformers(model_class: Any, config: Any) -> Callable[[Path, torch.dtype], Logits]:
    def write(folder: Path, dtype: torch.dtype) -> Logits:
        built = model_class.from_config(config) if model_class is AutoModelForCausalLM else model_class(config)
        model = randomized(built, dtype)
        model.to(dtype).save_pretrained(folder)
        return says(model.float())

    return write


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes)))


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    def new(name: str) -> str:
        for old, stored in names.items():
            name = name.replace(old, stored)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def join_qkv(tensors: Tensors, stored: str, join: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensors:
    """`model.layers.i.self_attn.{q,k,v}_proj` of every layer as one `model.layers.i.<stored>`."""
    joined = {name: x for name, x in tensors.items() if not any(f".{one}_proj." in name for one in "qkv")}
    for name in tensors:
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"]
            joined[name.replace("self_attn.q_proj", stored)] = join(*parts)
    return joined


def write_internlm(folder: Path, dtype: torch.dtype) -> Logits:
    rope = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10000.0}
    model = randomized(llama(**MHA, attention_bias=True, rope_parameters=rope), dtype)
    config = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"} | {
        "architectures": ["InternLMForCausalLM"],
        "model_type": "internlm",
        "bias": True,
        "rotary": {"base": 10000, "type": "dynamic"},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write_files(folder, config, model.state_dict() | buffers, dtype)
    return says(model)


def write_internlm2(folder: Path, dtype: torch.dtype) -> Logits:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    model = randomized(llama(rope_parameters=rope), dtype)

    def interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for head in range(2):  # two query heads belong to each KV head
            rows += [q[32 * head : 32 * head + 32], k[16 * head : 16 * head + 16], v[16 * head : 16 * head + 16]]
        return torch.cat(rows)

    tensors = renamed(
        join_qkv(model.state_dict(), "attention.wqkv", interleave),
        {
            "embed_tokens": "tok_embeddings",
            "lm_head": "output",
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
            "mlp.down_proj": "feed_forward.w2",
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm",
        },
    )
    config = SHAPE | {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
    }
    write_files(folder, config, tensors, dtype)
    return says(model)


def write_internlm3_with_biases(folder: Path, dtype: torch.dtype) -> Logits:
    model = randomized(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), dtype)
    config = SHAPE | {
        "architectures": ["InternLM3ForCausalLM"],
        "qkv_bias": True,
        "bias": False,
        "head_dim": 16,
        "rope_theta": 10000,
    }
    write_files(folder, config, model.state_dict(), dtype)
    return says(model)


def baichuan(architecture: str, *, unit_head: bool) -> Callable[[Path, torch.dtype], Logits]:
    def write(folder: Path, dtype: torch.dtype) -> Logits:
        model = randomized(llama(**MHA), dtype)
        config = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"} | {
            "architectures": [architecture],
            "model_max_length": 16,
            "z_loss_weight": 0,
            "_from_model_config": True,
        }
        packed = join_qkv(model.state_dict(), "self_attn.W_pack", lambda q, k, v: torch.cat([q, k, v]))
        write_files(folder, config, packed, dtype)
        if unit_head:
            model.lm_head.weight.data = normalize(model.lm_head.weight.data)
        return says(model)

    return write


def write_yi(folder: Path, dtype: torch.dtype) -> Logits:
    model = randomized(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e6}), dtype)
    config = SHAPE | {"architectures": ["LlamaForCausalLM"], "rope_theta": 5000000.0, "pretraining_tp": 1}
    write_files(folder, config, model.state_dict(), dtype)
    return says(model)


META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.": "",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
META_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
META_COLUMNS = ("wo", "w2")


def meta(*, ranks: int, embedding_axis: int = 1, scaled: bool = False) -> Callable[[Path, torch.dtype], Logits]:
    """`consolidated.NN.pth` of `ranks` ranks; Llama 1 and 2 cut the embedding along axis 1, Llama 3 along axis 0."""

    def write(folder: Path, dtype: torch.dtype) -> Logits:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        if scaled:
            numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            rope = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, **numbers}
        model = randomized(llama(rope_parameters=rope), dtype)
        tensors = {name: x.to(dtype) for name, x in renamed(model.state_dict(), META_NAMES).items()}
        for name, x in tensors.items():
            if ".wq." in name or ".wk." in name:  # pairs (j, j + 8) of a head become neighbours
                tensors[name] = x.view(-1, 2, 8, 64).transpose(1, 2).reshape(x.shape)
        folder.mkdir(parents=True, exist_ok=True)
        params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "ffn_dim_multiplier": 1.3}
        params |= {"norm_eps": 1e-5, "vocab_size": -1, "rope_theta": 1e6}
        params |= {"use_scaled_rope": True, "rope_scaling_factor": 8} if scaled else {}
        (folder / "params.json").write_text(json.dumps(params))
        for rank in range(ranks):
            pieces = {"rope.freqs": torch.ones(8)}
            for name, x in tensors.items():
                stem = name.split(".")[-2]
                axis = 0 if stem in META_ROWS else 1 if stem in META_COLUMNS else None
                axis = embedding_axis if stem == "tok_embeddings" else axis
                pieces[name] = x.clone() if axis is None else x.chunk(ranks, dim=axis)[rank].clone()
            torch.save(pieces, folder / f"consolidated.{rank:02d}.pth")
        return says(model)

    return write


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
PLAIN = {"rope_scaling": None}

FAMILIES = [
    TinyFamily(name="llama", write=of_transformers(LlamaForCausalLM, LlamaConfig(**SHAPE, head_dim=24))),
    TinyFamily(
        name="llama3-scaled-tied",
        write=of_transformers(
            LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True, **_rope("llama3", **LLAMA3))
        ),
        matters=PLAIN,
    ),
    TinyFamily(
        name="llama-linear",
        write=of_transformers(LlamaForCausalLM, LlamaConfig(**SHAPE, **_rope("linear", factor=4.0))),
        matters=PLAIN,
    ),
    TinyFamily(
        name="llama-dynamic",
        write=of_transformers(LlamaForCausalLM, LlamaConfig(**SHAPE, **_rope("dynamic", factor=4.0))),
        matters=PLAIN,
    ),
    TinyFamily(
        name="codellama",
        write=of_transformers(
            LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        ),
        matters={"rope_theta": 1e4},
    ),
    TinyFamily(name="yi", write=write_yi, matters={"rope_theta": 1e4}),
    TinyFamily(name="internlm", write=write_internlm, matters=PLAIN),
    TinyFamily(name="internlm2", write=write_internlm2, matters=PLAIN),
    TinyFamily(name="internlm3", write=of_transformers(AutoModelForCausalLM, InternLM3Config(**SHAPE, head_dim=16))),
    TinyFamily(name="internlm3-biases", write=write_internlm3_with_biases),
    TinyFamily(name="qwen-ntk", write=write_qwen, matters=PLAIN),
    TinyFamily(name="qwen-logn", write=write_qwen, matters={"logn": False}),
    TinyFamily(
        name="qwen2-tied",
        write=of_transformers(Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    ),
    TinyFamily(
        name="qwen2-yarn",
        write=of_transformers(Qwen2ForCausalLM, Qwen2Config(**SHAPE, **_rope("yarn", **YARN))),
        matters=PLAIN,
    ),
    TinyFamily(
        name="qwen3", write=of_transformers(Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=24, attention_bias=True))
    ),
    TinyFamily(
        name="mistral",
        write=of_transformers(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=8)),
        matters={"sliding_window": None},
    ),
    TinyFamily(
        name="mistral-no-window", write=of_transformers(MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=None))
    ),
    TinyFamily(name="baichuan", write=baichuan("BaiChuanForCausalLM", unit_head=False)),
    TinyFamily(name="baichuan2", write=baichuan("BaichuanForCausalLM", unit_head=True)),
    TinyFamily(name="meta", write=meta(ranks=1), allow_bin=True),
    TinyFamily(name="meta-two-ranks", write=meta(ranks=2), allow_bin=True),
    TinyFamily(
        name="meta-llama3-two-ranks", write=meta(ranks=2, embedding_axis=0, scaled=True), matters=PLAIN, allow_bin=True
    ),
]
