"""The one table of weight names, shapes and cuts; every reader and writer of weights goes through it."""

from __future__ import annotations

from enum import Enum

from engine.config import ModelConfig


class Shard(Enum):
    """How tensor parallelism cuts a module: COLUMN along its outputs, ROW along its inputs, REPLICATED not at all."""

    COLUMN = "column"
    ROW = "row"
    REPLICATED = "replicated"


LAYER_SHARDS: dict[str, Shard] = {
    "input_layernorm": Shard.REPLICATED,
    "self_attn.q_proj": Shard.COLUMN,
    "self_attn.k_proj": Shard.COLUMN,
    "self_attn.v_proj": Shard.COLUMN,
    "self_attn.q_norm": Shard.REPLICATED,
    "self_attn.k_norm": Shard.REPLICATED,
    "self_attn.o_proj": Shard.ROW,
    "post_attention_layernorm": Shard.REPLICATED,
    "mlp.gate_proj": Shard.COLUMN,
    "mlp.up_proj": Shard.COLUMN,
    "mlp.down_proj": Shard.ROW,
}

NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
LINEARS = (*QKV, OUTPUT, *GATE_UP, DOWN)

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
QUANTIZED = ("qweight", "qzeros", "scales")
# Float32 [out] beside an int8 `weight` [out, in].
WEIGHT_SCALE = "weight_scale"
INT8 = ("weight", WEIGHT_SCALE)
LAYER_PREFIX = "model.layers."


def layer_name(layer: int, name: str) -> str:
    """The full name of a tensor of a layer: (3, "mlp.up_proj.weight") -> "model.layers.3.mlp.up_proj.weight"."""
    return f"{LAYER_PREFIX}{layer}.{name}"


def split_name(name: str) -> tuple[int | None, str]:
    """`layer_name` read backwards; (None, name) for a tensor outside the layers."""
    if name.startswith(LAYER_PREFIX):
        number, _, rest = name[len(LAYER_PREFIX) :].partition(".")
        if number.isdecimal() and rest:
            return int(number), rest
    return None, name


def linear_shape(config: ModelConfig, module: str) -> tuple[int, int]:
    """(out, in) features of a linear of a layer, such as "self_attn.q_proj"."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }[module]


def has_bias(config: ModelConfig, module: str) -> bool:
    """Whether a linear of a layer has a bias: those of the attention do where the config says so."""
    return (config.qkv_bias and module in QKV) or (config.o_bias and module == OUTPUT)


def layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names (within the layer) and shapes of the unquantized tensors of one layer, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in LAYER_SHARDS:
        if module in NORMS:
            shapes[f"{module}.weight"] = (config.hidden_size,)
            continue
        if module in HEAD_NORMS:
            shapes |= {f"{module}.weight": (config.head_dim,)} if config.qk_norm else {}
            continue
        shapes[f"{module}.weight"] = linear_shape(config, module)
        if has_bias(config, module):
            shapes[f"{module}.bias"] = linear_shape(config, module)[:1]
    return shapes


def model_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full names and shapes of every unquantized tensor of the model; `lm_head.weight` is listed even when tied."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= {layer_name(layer, name): shape for name, shape in layer_tensors(config).items()}
    return shapes | {FINAL_NORM: (config.hidden_size,), HEAD: (config.vocab_size, config.hidden_size)}
