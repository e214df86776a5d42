"""Models by name for benchmarks that need no checkpoint: the shapes of public ones, and tiny ones for tests."""

from __future__ import annotations

from dataclasses import replace

from engine.config import ModelConfig, RopeScaling

_LLAMA = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    norm_eps=1e-5,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)
_LLAMA3_ROPE = RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
SHAPES: dict[str, ModelConfig] = {
    # The seed's InternLM-chat-7B without its biases, as a Llama: what the peers that it is compared with can load.
    "internlm7b": replace(_LLAMA, vocab_size=103168, norm_eps=1e-6),
    "llama2_7b": _LLAMA,
    "llama3_8b": replace(
        _LLAMA,
        vocab_size=128256,
        num_kv_heads=8,
        intermediate_size=14336,
        rope_theta=500000.0,
        max_position_embeddings=8192,
    ),
    "qwen2_5_7b": replace(
        _LLAMA,
        family="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        intermediate_size=18944,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        qkv_bias=True,
    ),
    # Llama-3.2-1B.
    "llama1b": replace(
        _LLAMA,
        vocab_size=128256,
        hidden_size=2048,
        num_layers=16,
        num_kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
        rope_theta=500000.0,
        rope_scaling=replace(_LLAMA3_ROPE, factor=32.0),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    # TinyLlama-1.1B.
    "tinyllama_1b": replace(
        _LLAMA,
        hidden_size=2048,
        num_layers=22,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=5632,
        max_position_embeddings=2048,
    ),
    "tiny": replace(
        _LLAMA,
        vocab_size=512,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=2048,
    ),
}


def shape(name: str) -> ModelConfig:
    """The model of a name; ValueError names those that there are."""
    if name not in SHAPES:
        raise ValueError(f"shape={name} is not known; there are {', '.join(SHAPES)}.")
    return SHAPES[name]
