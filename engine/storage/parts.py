"""A part of a layer as its rank files hold it, made from canonical tensors and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage import turbomind_files as files
from engine.storage import turbomind_layout as layout
from engine.storage.config_ini import weight_type_of
from engine.storage.file_writer import BLOCK_BYTES
from engine.storage.rank_cuts import TILE, rank_cut
from engine.storage.turbomind_files import Part


def split_part(
    config: ModelConfig,
    recipe: Recipe,
    part: Part,
    kind: str,
    layer: int,
    ask: Callable[[str, tuple[int, ...]], Tensor],
    *,
    tp: int,
) -> Iterator[tuple[int, Tensor]]:
    """What the files of one kind of a part hold, as (rank, block): the blocks of a file come in their order.

    `ask(name, shape)` gives tensors by canonical name, floats of any type, which are cast here. Of the large kinds a
    block has BLOCK_BYTES or little more, all ranks together, so that memory is what `ask` takes and a few blocks.
    """
    if kind in ("weight", "qweight"):
        yield from _matrix_blocks(config, recipe, part, kind, layer, ask, tp=tp)
        return
    dtype = files.FLOAT_TYPES[weight_type_of(config, recipe)]
    cut, along = rank_cut(config, recipe, part.modules, tp), part.cut(kind)
    unit = _unit(part, kind, cut.group_size)

    def gather(source: str) -> list[Tensor]:
        matrices = []
        for module in part.modules:
            outputs, inputs = names.linear_shape(config, module)
            groups = inputs // max(recipe.group_size, 1)
            if source == "bias" and not names.has_bias(config, module):
                matrices.append(torch.zeros(1, outputs, dtype=dtype))
                continue
            shape = {"bias": (outputs,), "qzeros": (groups, outputs // 8), "scales": (groups, outputs)}[source]
            name = names.layer_name(layer, f"{module}.{source}")
            found = ask(name, shape)
            if source == "qzeros":
                matrix = layout.unpack_awq(found)
            else:
                matrix = cast(found, dtype, name).reshape(-1, outputs)
            if unit > 1:
                matrix = layout.refine_groups(matrix, recipe.group_size // unit)
            matrices.append(layout.interleave_rotary(matrix, config.head_dim) if module in part.rotary else matrix)
        pieces, stored = [piece // unit for piece in cut.pieces], cut.stored // unit
        return layout.split_ranks(matrices, tp, cut=along, join=part.join, pieces=pieces, stored=stored)

    if kind == "scales_zeros":
        pairs = zip(gather("scales"), gather("qzeros"), strict=True)
        yield from enumerate(layout.pack_scales_zeros(scales, zeros) for scales, zeros in pairs)
    else:
        yield from enumerate(gather(kind))


def _matrix_blocks(
    config: ModelConfig,
    recipe: Recipe,
    part: Part,
    kind: str,
    layer: int,
    ask: Callable[[str, tuple[int, ...]], Tensor],
    *,
    tp: int,
) -> Iterator[tuple[int, Tensor]]:
    dtype = files.FLOAT_TYPES[weight_type_of(config, recipe)]
    cut = rank_cut(config, recipe, part.modules, tp)
    shapes = [names.linear_shape(config, module) for module in part.modules]
    inputs, outputs = shapes[0][1], sum(shape[0] for shape in shapes)
    words = kind == "qweight"
    stored_shapes = [(i, o // 8) if words else (o, i) for o, i in shapes]
    canonical = [names.layer_name(layer, f"{module}.{kind}") for module in part.modules]
    asked = [ask(name, shape) for name, shape in zip(canonical, stored_shapes, strict=True)]

    def features(first: int, end: int) -> list[Tensor]:
        """Rows of the matrices: [in, out], or AWQ words [in, out/8]."""
        matrices = []
        for module, name, source in zip(part.modules, canonical, asked, strict=True):
            rows = source[first:end] if words else cast(source[:, first:end], dtype, name).t()
            if module in part.rotary:
                rows = (layout.interleave_rotary_words if words else layout.interleave_rotary)(rows, config.head_dim)
            matrices.append(rows)
        return matrices

    pieces, width = cut.pieces, cut.stored
    if part.join == "interleave":  # of the whole, instead of every rank's pieces
        pieces = (sum(pieces),)
    if words:
        pieces, width = tuple(piece // 8 for piece in pieces), width // 8
    stored = layout.pack_tiles if words else layout.transposed
    if part.cut(kind) == "columns":
        for first, end in _steps(inputs, tp * cut.stored * 2):
            matrices = features(first, end)
            if part.join == "interleave":
                matrices = [layout.interleave_words(*matrices)]
            ranks = layout.split_ranks(matrices, tp, cut="columns", join="concatenate", pieces=pieces, stored=width)
            yield from enumerate(map(stored, ranks))
        return
    [size] = cut.pieces
    for rank in range(tp):
        begin, limit = rank * size, min((rank + 1) * size, inputs)
        for first, end in _steps(cut.stored, outputs * 2):
            [matrix] = features(begin + first, max(begin + first, min(begin + end, limit)))
            yield rank, stored(layout.widen(matrix, end - first, dim=0))


def _steps(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of rows that have BLOCK_BYTES in 16 bits, a quarter in 4, or one row of tiles."""
    step = max(BLOCK_BYTES // row_bytes // TILE, 1) * TILE
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def join_part(
    config: ModelConfig, recipe: Recipe, part: Part, read: Callable[[str, int], Tensor], *, tp: int
) -> dict[str, Tensor]:
    """Undo `split_part`: the canonical tensors of a part, named within the layer; `read(kind, rank)` gives a file."""
    inputs, outputs = files.matrix_shape(config, recipe, part, tp)
    cut = rank_cut(config, recipe, part.modules, tp)
    shapes = [names.linear_shape(config, module) for module in part.modules]

    def ranks(kind: str) -> list[Tensor]:
        return [read(kind, rank) for rank in range(tp)]

    def join(matrices: Sequence[Tensor], kind: str) -> dict[str, Tensor]:
        along, sizes, pieces = part.cut(kind), [shape[0] for shape in shapes], cut.pieces
        if along == "rows":
            unit = _unit(part, kind, cut.group_size)
            sizes, pieces = [shapes[0][1] // unit], tuple(piece // unit for piece in cut.pieces)
        whole = layout.join_ranks(matrices, sizes, cut=along, join=part.join, pieces=pieces)
        if along == "rows" and kind == "scales_zeros":
            whole = [layout.merge_groups(matrix, recipe.group_size // cut.group_size) for matrix in whole]
        return {
            module: layout.separate_rotary(matrix, config.head_dim) if module in part.rotary else matrix
            for module, matrix in zip(part.modules, whole, strict=True)
        }

    tensors: dict[str, Tensor] = {}
    for kind in files.kinds_of(config, recipe, part):
        if kind == "weight":
            matrices = join([rank.view(inputs, outputs) for rank in ranks(kind)], kind)
            tensors |= {f"{module}.weight": matrix.t().contiguous() for module, matrix in matrices.items()}
        elif kind == "bias":
            matrices = join([rank.view(1, outputs) for rank in ranks(kind)], kind)
            tensors |= {f"{module}.bias": matrix[0] for module, matrix in matrices.items()}
        elif kind == "qweight":
            matrices = join([layout.unpack_tiles(rank, inputs, outputs) for rank in ranks(kind)], kind)
            tensors |= {f"{module}.qweight": layout.pack_awq(matrix) for module, matrix in matrices.items()}
        else:
            pairs = [layout.unpack_scales_zeros(rank.view(-1, outputs)) for rank in ranks(kind)]
            scales, zeros = (join(list(matrices), kind) for matrices in zip(*pairs, strict=True))
            tensors |= {f"{module}.qzeros": layout.pack_awq(matrix) for module, matrix in zeros.items()}
            tensors |= {f"{module}.scales": matrix.contiguous() for module, matrix in scales.items()}
    return tensors


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in the type of the files; ValueError naming it where that holds not all of its values."""
    if tensor.dtype == dtype:
        return tensor
    stored = tensor.to(dtype)
    if stored.numel() and not all(bool(end.isfinite()) for end in stored.aminmax()):  # a NaN is both ends
        raise ValueError(f"{name} holds values that {dtype} cannot (largest {tensor.abs().max().item():g})")
    return stored


def _unit(part: Part, kind: str, group_size: int) -> int:
    """Input features that a row of a file stands for."""
    return group_size if kind == "scales_zeros" and part.cut(kind) == "rows" else 1
