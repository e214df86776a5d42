"""A config.json of every family and of both quantized forms, and the files of a checkpoint that fits one."""

import json
from typing import Any

import torch
from safetensors.torch import save

from engine.models.families import family_of, model_config
from engine.models.layouts import Layout
from engine.models.quantization import read_quantization, unquantized
from engine.storage.door import sources

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
MHA = {"num_key_value_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "mscale": 1.0, "truncate": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    "input_activations": None,
}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
}


def _config(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SHAPE, "torch_dtype": "float32", **changes}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _config("LlamaForCausalLM", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0}, head_dim=8),
    "llama3": _config("LlamaForCausalLM", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    "yarn": _config("Qwen2ForCausalLM", rope_scaling={"rope_type": "yarn", **YARN}, use_sliding_window=False),
    "dynamic": _config("InternLM2ForCausalLM", bias=False, rope_scaling={"type": "dynamic", "factor": 2.0}),
    "mistral": _config("MistralForCausalLM", sliding_window=8, layer_types=None),
    "internlm": _config("InternLMForCausalLM", **MHA, bias=True, rotary={"base": 10000, "type": "dynamic"}),
    "internlm3": _config("InternLM3ForCausalLM", qkv_bias=False, head_dim=8),
    "qwen": _config("QWenLMHeadModel", **MHA)
    | {"layer_norm_epsilon": 1e-6, "seq_length": 2, "kv_channels": 8, "use_logn_attn": True, "use_dynamic_ntk": True},
    "qwen3": _config("Qwen3ForCausalLM", head_dim=8, attention_bias=False, layer_types=["full_attention"]),
    "baichuan": _config("BaiChuanForCausalLM", **MHA),
    "baichuan2": _config("BaichuanForCausalLM", **MHA, z_loss_weight=0),
    "awq": _config("LlamaForCausalLM", quantization_config=AWQ),
    "packed": _config("LlamaForCausalLM", quantization_config=PACKED),
}


def tensors_of(hf_config: dict[str, Any], layout: Layout | None = None) -> dict[str, torch.Tensor]:
    """Random tensors, by their stored names (those of `layout`), of the checkpoint that a config.json describes."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    config = model_config(unquantized(hf_config))
    for source in sources(config, layout or family_of(hf_config).layout, read_quantization(hf_config)).values():
        drawn = torch.randn(source.shape, generator=generator)
        integers = {"I32": drawn.mul(1 << 20).int(), "I8": drawn.mul(32).to(torch.int8), None: drawn}
        found[source.stored] = integers[source.codes]
    return found


def checkpoint_files(hf_config: dict[str, Any]) -> dict[str, bytes]:
    """config.json and model.safetensors."""
    return {"config.json": json.dumps(hf_config).encode(), "model.safetensors": save(tensors_of(hf_config))}
