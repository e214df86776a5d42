"""The weight files of a TurboMind workspace: one table of names for writer and reader, and what fits it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage.head_files import head_bytes, head_problem
from engine.storage.rank_cuts import TILE, rank_cut
from engine.storage.turbomind_layout import Cut, Join


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Linears of a layer that TurboMind keeps in one matrix per rank, `layers.<i>.<stem>.<rank>.<kind>`.

    `rotary` modules are stored with adjacent rotary pairs.
    """

    stem: str
    modules: tuple[str, ...]
    join: Join = "concatenate"
    rotary: tuple[str, ...] = ()

    def cut(self, kind: str) -> Cut:
        """How tensor parallelism cuts a file of this part, seen as a matrix [in, out].

        The bias and the scales of the outputs of a row-cut linear are copied to every rank.
        """
        if names.LAYER_SHARDS[self.modules[0]] is names.Shard.COLUMN:
            return "columns"
        return "copies" if kind in ("bias", names.WEIGHT_SCALE) else "rows"


OUTER_FILES = {
    "tok_embeddings.weight": names.EMBEDDING,
    "norm.weight": names.FINAL_NORM,
    "output.weight": names.HEAD,
}
NORM_FILES = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# Of ours: the reference has no model with norms over heads. In TurboMind's rotary order, as the heads are.
HEAD_NORM_FILES = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
QKV = Part(stem="attention.w_qkv", modules=names.QKV, rotary=names.QKV[:2])
OUTPUT = Part(stem="attention.wo", modules=(names.OUTPUT,))
DOWN = Part(stem="feed_forward.w2", modules=(names.DOWN,))
DENSE_PARTS = (
    QKV,
    OUTPUT,
    Part(stem="feed_forward.w1", modules=names.GATE_UP[:1]),
    Part(stem="feed_forward.w3", modules=names.GATE_UP[1:]),
    DOWN,
)
INT4_PARTS = (QKV, OUTPUT, Part(stem="feed_forward.w13", modules=names.GATE_UP, join="interleave"), DOWN)
# Beyond every group that is listed as one that fits.
LARGEST_GROUP = 1 << 16


def layer_file(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"


def rank_file(layer: int, part: Part, rank: int, kind: str) -> str:
    return f"layers.{layer}.{part.stem}.{rank}.{kind}"


def parts_of(recipe: Recipe) -> tuple[Part, ...]:
    """The parts of a layer under a recipe; ValueError for weights that the format does not have."""
    tables = {"fp16": DENSE_PARTS, "w4a16": INT4_PARTS, "w8a8": DENSE_PARTS}
    if recipe.weights not in tables:
        raise ValueError(f"a TurboMind workspace cannot hold {recipe.weights} weights; it can hold {', '.join(tables)}")
    return tables[recipe.weights]


def kinds_of(config: ModelConfig, recipe: Recipe, part: Part) -> tuple[str, ...]:
    """The files that a part has per rank: (weight), (qweight, scales_zeros) or (weight, weight_scale), then bias."""
    kinds = {"w4a16": ("qweight", "scales_zeros"), "w8a8": names.INT8}.get(recipe.weights, ("weight",))
    return (*kinds, "bias") if has_bias(config, part) else kinds


def float_type(config: ModelConfig, recipe: Recipe) -> torch.dtype:
    """The type of what is not quantized: bf16 for a bf16 model, but fp16 beside int4 as in the reference."""
    return torch.bfloat16 if config.dtype == "bfloat16" and recipe.weights != "w4a16" else torch.float16


def element_type(config: ModelConfig, recipe: Recipe, kind: str) -> torch.dtype:
    """The type of the values in the files of one kind of a part."""
    if kind in ("qweight", "scales_zeros"):
        return torch.int32
    if kind == names.WEIGHT_SCALE:
        return torch.float32
    return torch.int8 if kind == "weight" and recipe.weights == "w8a8" else float_type(config, recipe)


def has_bias(config: ModelConfig, part: Part) -> bool:
    """Whether a part has bias files: config.ini has one key for q, k, v and o, so that what is missing is zeros."""
    return (config.qkv_bias or config.o_bias) and part in (QKV, OUTPUT)


def norm_files(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """The norms of a layer: file name -> (canonical name within the layer, values)."""
    sizes = {file: (within, config.hidden_size) for file, within in NORM_FILES.items()}
    if config.qk_norm:
        sizes |= {file: (within, config.head_dim) for file, within in HEAD_NORM_FILES.items()}
    return sizes


def matrix_shape(config: ModelConfig, recipe: Recipe, part: Part, tp: int) -> tuple[int, int]:
    """(in, out) features of one rank's stored matrix of a part, with what fills it up."""
    shapes = [names.linear_shape(config, module) for module in part.modules]
    stored = rank_cut(config, recipe, part.modules, tp).stored
    inputs, outputs = shapes[0][1], sum(shape[0] for shape in shapes)
    return (inputs, stored) if part.cut("weight") == "columns" else (stored, outputs)


def file_bytes(config: ModelConfig, recipe: Recipe, tp: int) -> dict[str, int]:
    """Name and size in bytes of every weight file (KV scales apart), in the order in which they are written."""
    return dict(each_file(config, recipe, tp))


def each_file(config: ModelConfig, recipe: Recipe, tp: int) -> Iterator[tuple[str, int]]:
    """`file_bytes` one by one: a config.ini may ask for more of them than there can be."""
    vocabulary = -(-config.vocab_size // tp) * tp
    norm = config.hidden_size * 2
    yield from {
        "tok_embeddings.weight": vocabulary * norm,
        "norm.weight": norm,
    }.items()
    yield from head_bytes(config, recipe, tp).items()
    for layer in range(config.num_layers):
        yield from ((layer_file(layer, name), values * 2) for name, (_, values) in norm_files(config).items())
        for part in parts_of(recipe):
            inputs, outputs = matrix_shape(config, recipe, part, tp)
            group_size = rank_cut(config, recipe, part.modules, tp).group_size
            of_kind = {
                "weight": inputs * outputs * element_type(config, recipe, "weight").itemsize,
                names.WEIGHT_SCALE: outputs * 4,
                "bias": outputs * 2,
                "qweight": inputs * outputs // 2,
                "scales_zeros": inputs // max(group_size, 1) * outputs * 4,
            }
            for kind in kinds_of(config, recipe, part):
                yield from ((rank_file(layer, part, rank, kind), of_kind[kind]) for rank in range(tp))


def load_order(config: ModelConfig, recipe: Recipe, tp: int, *, rank: int | None = None) -> list[tuple[str, int]]:
    """Names and sizes in the order in which a model is loaded: the embedding, the layers, what follows them. With a
    `rank` its share alone: the files of the layers that other ranks do not have to themselves."""
    sizes = file_bytes(config, recipe, tp)
    outer = [name for name in sizes if not name.startswith("layers.")]
    others = [r for r in range(tp) if rank not in (None, r)]
    layers = range(config.num_layers)
    foreign = {
        rank_file(layer, part, other, kind)
        for layer in layers
        for part in parts_of(recipe)
        for kind in kinds_of(config, recipe, part)
        for other in others
    }
    inner = [name for name in sizes if name.startswith("layers.") and name not in foreign]
    return [(name, sizes[name]) for name in (outer[0], *inner, *outer[1:])]


def check_fits(config: ModelConfig, recipe: Recipe, tp: int) -> None:
    """ValueError naming linear, dimension and what would fit, when a model cannot be laid out for `tp` ranks."""
    parts_of(recipe)
    if (problem := head_problem(config, recipe)) is not None:
        raise ValueError(problem)
    if recipe.rotate_down and recipe.weights != "w8a8":
        raise ValueError(f"rotate_down={recipe.rotate_down} goes with w8a8 weights, not with {recipe.weights}")
    if recipe.rotate_down and config.intermediate_size % recipe.rotate_down:
        raise ValueError(
            f"intermediate_size {config.intermediate_size} is no multiple of the {recipe.rotate_down} channels in "
            "which the inputs of down_proj are rotated: build it with weights.rotate_down=0"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim {config.head_dim} is odd: rotary embeddings need an even one")
    problem = next(_problems(config, recipe, tp), None)
    if problem is None:
        return
    advice = f"tp that fits: {_ranks_that_fit(config, recipe)}"
    if recipe.weights == "w4a16":
        groups = _groups_that_fit(config, recipe, tp)
        advice += f"; group_size that fits tp={tp}: {_listed(groups)}; weights=fp16 fits tp: "
        advice += _ranks_that_fit(config, Recipe(weights="fp16"))
    raise ValueError(f"{recipe.weights} with tp={tp} does not fit this model: {problem}; {advice}")


def _problems(config: ModelConfig, recipe: Recipe, tp: int) -> Iterator[str]:
    if tp < 1 or tp & (tp - 1):
        yield f"tp must be a power of two, not {tp}"
        return
    for count, what in ((config.num_heads, "attention heads"), (config.num_kv_heads, "key/value heads")):
        if count % tp:
            yield f"its {count} {what} cannot be dealt to {tp} ranks"
            return
    if recipe.weights == "w4a16":
        yield from _int4_problems(config, recipe.group_size, tp)


def _int4_problems(config: ModelConfig, group_size: int, tp: int) -> Iterator[str]:
    if config.hidden_size % TILE:
        yield f"hidden_size is {config.hidden_size}, and int4 tiles need a multiple of {TILE}"
    for module in names.LINEARS:
        outputs, inputs = names.linear_shape(config, module)
        if group_size < 1 or inputs % group_size:
            yield f"group_size {group_size} does not divide the {inputs} input features of model.layers.*.{module}"
        per_rank = outputs // tp if module in names.QKV else outputs
        if per_rank % 8:
            yield (
                f"model.layers.*.{module} has {per_rank} output features{' per rank' if tp > 1 else ''}, and 8 of them "
                "share a word"
            )


def _groups_that_fit(config: ModelConfig, recipe: Recipe, tp: int) -> list[int]:
    if next(_problems(config, Recipe(weights="fp16"), tp), None) is not None:
        return []
    shared = gcd(*(names.linear_shape(config, module)[1] for module in names.LINEARS))
    fitting = [
        g
        for g in range(1, min(shared, LARGEST_GROUP) + 1)
        if shared % g == 0 and not list(_int4_problems(config, g, tp))
    ]
    return [group for group in fitting if group >= 16] or fitting


def _ranks_that_fit(config: ModelConfig, recipe: Recipe) -> str:
    powers = [1 << bit for bit in range(config.num_heads.bit_length())]
    return _listed([tp for tp in powers if next(_problems(config, recipe, tp), None) is None])


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "none"
