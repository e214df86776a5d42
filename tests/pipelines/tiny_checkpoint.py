"""A checkpoint folder with random weights, its tokenizer and a text, small enough to build in a second."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.models.families import model_config
from engine.models.names import model_tensors
from tests.tiny_artifact import write_tokenizer

TEXT = "the cat sat on the mat and the dog ran to the cat in the rain. " * 120
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float16",
}


def write_tiny_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float16, replace=None, **changes) -> Path:
    """Write config, tokenizer and weights; `replace` (name -> tensor) takes the place of random ones."""
    folder.mkdir(parents=True)
    content = CONFIG | changes
    content["vocab_size"] = write_tokenizer(folder, chat_template="{{ messages[0].content }}")
    (folder / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, shape in model_tensors(model_config(content)).items():
        values = torch.randn(shape, generator=generator)
        # Channels of very different size: what activation-aware scales are for.
        spread = 1.0 + 3.0 * torch.rand(shape[-1], generator=generator) ** 4
        weights[name] = (values.abs() * spread if len(shape) == 1 else values * shape[-1] ** -0.5).to(dtype)
    weights |= {name: tensor.to(dtype) for name, tensor in (replace or {}).items()}
    save_file(weights, folder / "model.safetensors")
    return folder
