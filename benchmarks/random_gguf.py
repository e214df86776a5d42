"""A model of random weights as a GGUF file for llama.cpp: Q4_0 or Q8_0 linears and embedding, and an output matrix
of Q6_K where its blocks fit, as llama.cpp's own converter chooses.

The layout is that of ggml's `docs/gguf.md` and block formats: a block of 32 in Q4_0 is a float16 scale and 16 bytes of
codes, in Q8_0 a scale and 32 bytes; one of 256 in Q6_K 192 bytes of codes, 16 of scales and a float16 scale.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from benchmarks.random_weights import INT4_DEVIATION
from engine.config import ModelConfig

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
U32, F32, STRING = 4, 6, 8
# ggml's number of a type, weights a block, bytes a block, and where in it is its float16 scale.
TYPES = {"F32": (0, 1, 4, 0), "Q4_0": (2, 32, 18, 0), "Q8_0": (8, 32, 34, 0), "Q6_K": (14, 256, 210, 208)}
# Deviation of codes that are uniform, and of a Q6_K code times its scale of 8 bits.
DEVIATIONS = {"Q4_0": INT4_DEVIATION, "Q8_0": 74.0, "Q6_K": 18.5 * 74.0}
# In ggml's order: inputs first.
Shape = tuple[int, ...]


def write_gguf(path: Path, config: ModelConfig, kind: str, *, seed: int = 0) -> None:
    """Write a Llama of this shape; `kind` is Q4_0 or Q8_0. ValueError for a model that is not a plain Llama."""
    if config.family != "llama" or config.rope_scaling is not None or config.qkv_bias:
        raise ValueError(f"a GGUF file of the family {config.family} with these options is not written here.")
    tensors = _tensors(config, kind)
    fields = _fields(config)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
        for name, (number, value) in fields.items():
            _write_string(file, name)
            file.write(struct.pack("<I", number))
            if isinstance(value, str):
                _write_string(file, value)
            else:
                file.write(struct.pack({U32: "<I", F32: "<f"}[number], value))
        offset = 0
        for name, (shape, stored) in tensors.items():
            _write_string(file, name)
            file.write(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, TYPES[stored][0], offset))
            offset += -(-_bytes(shape, stored) // ALIGNMENT) * ALIGNMENT
        file.write(bytes(-file.tell() % ALIGNMENT))
        for shape, stored in tensors.values():
            file.write(_content(shape, stored, random))
            file.write(bytes(-file.tell() % ALIGNMENT))


def _tensors(config: ModelConfig, kind: str) -> dict[str, tuple[Shape, str]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found: dict[str, tuple[Shape, str]] = {"token_embd.weight": ((hidden, config.vocab_size), kind)}
    for layer in range(config.num_layers):
        parts = {
            "attn_norm": ((hidden,), "F32"),
            "attn_q": ((hidden, heads), kind),
            "attn_k": ((hidden, kv), kind),
            "attn_v": ((hidden, kv), kind),
            "attn_output": ((heads, hidden), kind),
            "ffn_norm": ((hidden,), "F32"),
            "ffn_gate": ((hidden, inner), kind),
            "ffn_up": ((hidden, inner), kind),
            "ffn_down": ((inner, hidden), kind),
        }
        found |= {f"blk.{layer}.{part}.weight": each for part, each in parts.items()}
    head = "Q6_K" if hidden % TYPES["Q6_K"][1] == 0 else kind
    return found | {"output_norm.weight": ((hidden,), "F32"), "output.weight": ((hidden, config.vocab_size), head)}


def _fields(config: ModelConfig) -> dict[str, tuple[int, str | int | float]]:
    return {
        "general.architecture": (STRING, "llama"),
        "general.alignment": (U32, ALIGNMENT),
        "llama.vocab_size": (U32, config.vocab_size),
        "llama.context_length": (U32, config.max_position_embeddings),
        "llama.embedding_length": (U32, config.hidden_size),
        "llama.block_count": (U32, config.num_layers),
        "llama.feed_forward_length": (U32, config.intermediate_size),
        "llama.attention.head_count": (U32, config.num_heads),
        "llama.attention.head_count_kv": (U32, config.num_kv_heads),
        "llama.rope.dimension_count": (U32, config.head_dim),
        "llama.rope.freq_base": (F32, config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": (F32, config.norm_eps),
        "tokenizer.ggml.model": (STRING, "none"),
    }


def _bytes(shape: Shape, stored: str) -> int:
    _, weights, size, _ = TYPES[stored]
    count = int(np.prod(shape))
    if shape[0] % weights:
        raise ValueError(f"{stored} has blocks of {weights} weights, which do not divide {shape[0]} inputs.")
    return count // weights * size


def _content(shape: Shape, stored: str, random: np.random.Generator) -> bytes:
    """Norms are 1; matrices keep the variance of their input."""
    if stored == "F32":
        return np.ones(shape, dtype=np.float32).tobytes()
    _, _, size, at = TYPES[stored]
    blocks = np.frombuffer(random.bytes(_bytes(shape, stored)), dtype=np.uint8).reshape(-1, size).copy()
    scale = np.float16(shape[0] ** -0.5 / DEVIATIONS[stored])
    blocks[:, at : at + 2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return blocks.tobytes()


def _write_string(file: BinaryIO, text: str) -> None:
    encoded = text.encode()
    file.write(struct.pack("<Q", len(encoded)) + encoded)
