"""The output matrix in 8 or 4 bits: its files and its tensors. Ours; the reference has it in 16 bits alone.

`int8`: `output.weight` int8 [V', H] and `output.weight_scale` float32 [V'], a scale a row, value = q * s; V' is the
vocabulary filled up with zeros to a multiple of tp, as in 16 bits.
`int4`: `output.qweight` and `output.scales_zeros` as those of a linear with H inputs and V" outputs, in the groups of
the other weights; V" is the vocabulary filled up to whole tiles with zero groups, whatever tp is.
Neither is cut for ranks. The canonical tensors are those of a linear `lm_head`; of int4 they have V" outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage import turbomind_layout as layout
from engine.storage.file_writer import BLOCK_BYTES
from engine.storage.int4_tiles import pack_tiles, unpack_tiles
from engine.storage.rank_cuts import TILE

Ask = Callable[[str, tuple[int, ...]], Tensor]
MODULE = names.HEAD.removesuffix(".weight")
WEIGHT, SCALE, QWEIGHT, SCALES_ZEROS = (
    f"output.{kind}" for kind in ("weight", names.WEIGHT_SCALE, "qweight", "scales_zeros")
)


def head_problem(config: ModelConfig, recipe: Recipe) -> str | None:
    """Why a model cannot have the head that a recipe asks for; None where it can."""
    if recipe.head == "fp16":
        return None
    if recipe.weights != "w4a16":
        return f"head={recipe.head} goes with w4a16 weights, not with {recipe.weights}"
    if recipe.head == "int4" and (config.hidden_size % TILE or config.hidden_size % recipe.group_size):
        return f"hidden_size {config.hidden_size} is no multiple of {TILE} and of group_size {recipe.group_size}"
    return None


def padded_outputs(config: ModelConfig) -> int:
    """V"."""
    return -(-config.vocab_size // TILE) * TILE


def head_tensors(config: ModelConfig, recipe: Recipe) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The canonical tensors of a quantized head, and their types and shapes; empty for fp16."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    if recipe.head == "int8":
        kinds = {"weight": (torch.int8, (vocabulary, hidden)), names.WEIGHT_SCALE: (torch.float32, (vocabulary,))}
    elif recipe.head == "int4":
        groups, outputs = hidden // recipe.group_size, padded_outputs(config)
        kinds = {
            "qweight": (torch.int32, (hidden, outputs // 8)),
            "qzeros": (torch.int32, (groups, outputs // 8)),
            "scales": (torch.float16, (groups, outputs)),
        }
    else:
        kinds = {}
    return {f"{MODULE}.{kind}": planned for kind, planned in kinds.items()}


def head_bytes(config: ModelConfig, recipe: Recipe, tp: int) -> dict[str, int]:
    """The files of a head and their sizes in bytes, in the order in which they are written."""
    hidden, rows = config.hidden_size, -(-config.vocab_size // tp) * tp
    if recipe.head == "int8":
        return {WEIGHT: rows * hidden, SCALE: rows * 4}
    if recipe.head == "int4":
        outputs = padded_outputs(config)
        return {QWEIGHT: hidden * outputs // 2, SCALES_ZEROS: hidden // recipe.group_size * outputs * 4}
    return {WEIGHT: rows * hidden * 2}


def head_blocks(config: ModelConfig, recipe: Recipe, ask: Ask, *, tp: int) -> Iterator[tuple[str, Tensor]]:
    """(file, block) of a quantized head, blocks of a file in their order; `ask` answers with a canonical tensor."""
    planned = head_tensors(config, recipe)

    def tensor(kind: str) -> Tensor:
        dtype, shape = planned[f"{MODULE}.{kind}"]
        found = ask(f"{MODULE}.{kind}", shape)
        if found.dtype != dtype:
            raise ValueError(f"{MODULE}.{kind} is {found.dtype}; a head of {recipe.head} has {dtype}")
        return found

    if recipe.head == "int8":
        rows = -(-config.vocab_size // tp) * tp
        yield WEIGHT, layout.widen(tensor("weight"), rows, dim=0)
        yield SCALE, layout.widen(tensor(names.WEIGHT_SCALE)[None], rows, dim=1)
        return
    words = tensor("qweight")
    step = max(BLOCK_BYTES // (words.shape[1] * 4) // TILE, 1) * TILE
    for some in torch.split(words, step):
        yield QWEIGHT, pack_tiles(some.contiguous())
    yield SCALES_ZEROS, layout.pack_scales_zeros(tensor("scales"), layout.unpack_awq(tensor("qzeros")))


def read_head(name: str, config: ModelConfig, recipe: Recipe, read: Callable[[str, torch.dtype], Tensor]) -> Tensor:
    """One canonical tensor of a quantized head; `read` maps a file as a flat tensor. Undoes `head_blocks`.

    ValueError for scales or zero points that are none.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    if recipe.head == "int8":
        if name.endswith(names.WEIGHT_SCALE):
            scales = read(SCALE, torch.float32)[:vocabulary]
            if not bool(scales.isfinite().all()) or bool((scales < 0).any()):
                raise ValueError(f"{SCALE} holds values that are negative or not finite: these are no scales")
            return scales
        return read(WEIGHT, torch.int8).view(-1, hidden)[:vocabulary]
    outputs = padded_outputs(config)
    if name.endswith("qweight"):
        return unpack_tiles(read(QWEIGHT, torch.int32).view(hidden // TILE, outputs // TILE, -1)).contiguous()
    scales, zeros = layout.unpack_scales_zeros(read(SCALES_ZEROS, torch.int32).view(-1, outputs))
    return layout.pack_awq(zeros) if name.endswith("qzeros") else scales


def head_of_rank(tensor: Tensor, kind: str, config: ModelConfig, *, rank: int, tp: int) -> Tensor:
    """The outputs that a rank has of one tensor of the head, zeros at the end; of int4 whole words of 8."""
    if kind in ("weight", names.WEIGHT_SCALE):
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]
        piece = layout.rank_piece(matrix, rank, -(-config.vocab_size // tp), dim=0)
        return piece if tensor.dim() == 2 else piece[:, 0]
    words = -(-config.vocab_size // (8 * tp))
    return layout.rank_piece(tensor, rank, words * 8 if kind == "scales" else words, dim=1).contiguous()
