"""A random model of a few thousand weights and a tokenizer of single characters, for tests of the runtime."""

from collections.abc import Sequence

import torch

from engine.config import ModelConfig
from engine.models.batch import packed
from engine.models.decoder import Decoder
from engine.runtime.tokenizer import TokenTexts

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."
END = len(ALPHABET)
CONFIG = ModelConfig(
    family="llama",
    vocab_size=len(ALPHABET) + 1,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    norm_eps=1e-5,
    dtype="float32",
)


# Where there is a GPU the tests of the runtime are tests of its kernels and graphs.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_model(config: ModelConfig = CONFIG, device: str = DEVICE) -> Decoder:
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * 2 / columns**0.5

    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(config.vocab_size, hidden) * hidden**0.5,
        "lm_head.weight": matrix(config.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = torch.ones(hidden)
        weights[prefix + "post_attention_layernorm.weight"] = torch.ones(hidden)
        weights[prefix + "self_attn.q_proj.weight"] = matrix(config.num_heads * size, hidden)
        weights[prefix + "self_attn.k_proj.weight"] = matrix(config.num_kv_heads * size, hidden)
        weights[prefix + "self_attn.v_proj.weight"] = matrix(config.num_kv_heads * size, hidden)
        weights[prefix + "self_attn.o_proj.weight"] = matrix(hidden, config.num_heads * size)
        weights[prefix + "mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[prefix + "mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[prefix + "mlp.down_proj.weight"] = matrix(hidden, inner)
    return Decoder(config, weights, device=device, dtype=torch.float32)


def whole_logits(model: Decoder, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of every position without a cache: what every other way of computing must reproduce."""
    with torch.inference_mode():
        return model(packed([tokens], device=model.device), None).cpu()


def greedy(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(whole_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class CharTokenizer:
    """Token i is character i of the alphabet; the token after them ends an answer."""

    eos_token_ids: tuple[int, ...]
    leading_spaces = 0

    def __init__(self, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.eos_token_ids = eos_token_ids

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return ALPHABET[token_id].encode() if token_id < END else b""

    def texts(self, *, skip_special: bool = True) -> TokenTexts:
        return TokenTexts(self, skip_special)

    def text(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode()
