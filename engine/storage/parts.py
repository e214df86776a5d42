"""A part of a layer as its rank files hold it, made from canonical tensors and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage import turbomind_files as files
from engine.storage import turbomind_layout as layout
from engine.storage.file_writer import BLOCK_BYTES
from engine.storage.int4_tiles import (
    pack_alternating_tiles,
    pack_tiles,
    unpack_alternating_tiles,
    unpack_tiles,
)
from engine.storage.rank_cuts import TILE, RankCut, rank_cut
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
    if kind == "weight" and recipe.weights == "w8a8":
        yield from _int8_blocks(config, recipe, part, layer, ask, tp=tp)
        return
    if kind in ("weight", "qweight"):
        yield from _matrix_blocks(config, recipe, part, kind, layer, ask, tp=tp)
        return
    dtype = torch.float32 if kind == names.WEIGHT_SCALE else files.float_type(config, recipe)
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
            shape = {"qzeros": (groups, outputs // 8), "scales": (groups, outputs)}.get(source, (outputs,))
            name = names.layer_name(layer, f"{module}.{source}")
            found = ask(name, shape)
            if source == names.WEIGHT_SCALE and not _are_scales(found):
                raise ValueError(f"{name} holds values that are negative or not finite: these are no scales")
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
    dtype = files.float_type(config, recipe)
    cut = rank_cut(config, recipe, part.modules, tp)
    shapes = [names.linear_shape(config, module) for module in part.modules]
    inputs, outputs = shapes[0][1], sum(shape[0] for shape in shapes)
    words = kind == "qweight"
    stored_shapes = [(i, o // 8) if words else (o, i) for o, i in shapes]
    canonical = [names.layer_name(layer, f"{module}.{kind}") for module in part.modules]
    asked = [ask(name, shape) for name, shape in zip(canonical, stored_shapes, strict=True)]
    asked = [source.contiguous() for source in asked] if words else asked

    def features(first: int, end: int) -> list[Tensor]:
        """Rows of the matrices: [in, out], or AWQ words [in, out/8]."""
        if words:
            return [source[first:end] for source in asked]
        matrices = []
        for module, name, source in zip(part.modules, canonical, asked, strict=True):
            rows = cast(source[:, first:end], dtype, name).t()
            matrices.append(layout.interleave_rotary(rows, config.head_dim) if module in part.rotary else rows)
        return matrices

    if part.cut(kind) == "columns":
        for first, end in _steps(inputs, tp * cut.stored * 2):
            matrices = features(first, end)
            if words:
                yield from enumerate(_tiles(config, part, matrices, cut, rank) for rank in range(tp))
                continue
            ranks = layout.split_ranks(
                matrices, tp, cut="columns", join="concatenate", pieces=cut.pieces, stored=cut.stored
            )
            yield from enumerate(map(layout.transposed, ranks))
        return
    stored = pack_tiles if words else layout.transposed
    [size] = cut.pieces
    for rank in range(tp):
        begin, limit = rank * size, min((rank + 1) * size, inputs)
        for first, end in _steps(cut.stored, outputs * 2):
            [matrix] = features(begin + first, max(begin + first, min(begin + end, limit)))
            yield rank, stored(layout.widen(matrix, end - first, dim=0))


def _tiles(config: ModelConfig, part: Part, words: Sequence[Tensor], cut: RankCut, rank: int) -> Tensor:
    """The columns that a rank has of the matrices of a part, AWQ words, as tiles."""
    runs = [layout.rank_piece(one, rank, piece // 8, dim=1) for one, piece in zip(words, cut.pieces, strict=True)]
    if part.join == "interleave":
        return pack_alternating_tiles(*runs)
    if _heads_fill_tiles(config, part):
        tiles = []
        for module, run in zip(part.modules, runs, strict=True):
            heads = run.reshape(len(run), -1, 2, config.head_dim // 16)
            rotary = module in part.rotary
            tiles.append(pack_alternating_tiles(*heads.unbind(2)) if rotary else pack_tiles(run))
        return torch.cat(tiles, dim=1)
    for at, module in enumerate(part.modules):
        if module in part.rotary:
            runs[at] = layout.pack_awq(layout.interleave_rotary(layout.unpack_awq(runs[at]), config.head_dim))
    return pack_tiles(layout.widen(torch.cat(runs, dim=1), cut.stored // 8, dim=1))


def _words(config: ModelConfig, part: Part, tiles: Tensor, cut: RankCut) -> list[Tensor]:
    """The AWQ words that a rank has of each matrix of a part; undoes `_tiles`."""
    if part.cut("qweight") == "rows":
        return [unpack_tiles(tiles)]
    if part.join == "interleave":
        return list(unpack_alternating_tiles(tiles))
    if _heads_fill_tiles(config, part):
        runs = []
        for module, run in zip(
            part.modules, torch.split(tiles, [piece // TILE for piece in cut.pieces], dim=1), strict=True
        ):
            if module in part.rotary:
                halves = [half.view(len(half), -1, config.head_dim // 16) for half in unpack_alternating_tiles(run)]
                runs.append(torch.stack(halves, dim=2).flatten(1))
            else:
                runs.append(unpack_tiles(run))
        return runs
    words = unpack_tiles(tiles).narrow(1, 0, sum(cut.pieces) // 8)
    runs = list(torch.split(words, [piece // 8 for piece in cut.pieces], dim=1))
    for at, module in enumerate(part.modules):
        if module in part.rotary:
            runs[at] = layout.pack_awq(layout.separate_rotary(layout.unpack_awq(runs[at]), config.head_dim))
    return runs


def _heads_fill_tiles(config: ModelConfig, part: Part) -> bool:
    """Whether q, k and v are turned and joined by whole tiles."""
    return bool(part.rotary) and config.head_dim % TILE == 0


def _int8_blocks(
    config: ModelConfig,
    recipe: Recipe,
    part: Part,
    layer: int,
    ask: Callable[[str, tuple[int, ...]], Tensor],
    *,
    tp: int,
) -> Iterator[tuple[int, Tensor]]:
    """Rows of int8 matrices, which lie [out, in] in their files: columns of [in, out] are rows here."""
    dim = 0 if part.cut("weight") == "columns" else 1
    asked = []
    for module in part.modules:
        name = names.layer_name(layer, f"{module}.weight")
        asked.append(ask(name, names.linear_shape(config, module)))
        if asked[-1].dtype != torch.int8:
            raise ValueError(f"{name} is {asked[-1].dtype}; w8a8 weights are int8, with their {names.WEIGHT_SCALE}")
    for rank in range(tp):
        for module, matrix, size in zip(
            part.modules, asked, rank_cut(config, recipe, part.modules, tp).pieces, strict=True
        ):
            piece = layout.rank_piece(matrix, rank, size, dim=dim)
            if module in part.rotary:
                piece = layout.interleave_rotary(piece.t(), config.head_dim).t()
            for first, end in _steps(len(piece), piece.shape[1]):
                yield rank, piece[first:end].contiguous()


def _steps(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of rows that have BLOCK_BYTES in all (a quarter of it in 4 bits), or one row of tiles."""
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

    def join_int8(matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        flipped: layout.Cut = "rows" if part.cut("weight") == "columns" else "columns"
        sizes = [shape[0] for shape in shapes] if flipped == "rows" else [shapes[0][1]]
        whole = layout.join_ranks(matrices, sizes, cut=flipped, join=part.join, pieces=cut.pieces)
        return {
            module: layout.separate_rotary(matrix.t(), config.head_dim).t() if module in part.rotary else matrix
            for module, matrix in zip(part.modules, whole, strict=True)
        }

    tensors: dict[str, Tensor] = {}
    for kind in files.kinds_of(config, recipe, part):
        if kind == "weight" and recipe.weights == "w8a8":
            matrices = join_int8([rank.view(outputs, inputs) for rank in ranks(kind)])
            tensors |= {f"{module}.weight": matrix.contiguous() for module, matrix in matrices.items()}
        elif kind == "weight":
            matrices = join([rank.view(inputs, outputs) for rank in ranks(kind)], kind)
            tensors |= {f"{module}.weight": matrix.t().contiguous() for module, matrix in matrices.items()}
        elif kind in ("bias", names.WEIGHT_SCALE):
            matrices = join([rank.view(1, outputs) for rank in ranks(kind)], kind)
            if kind == names.WEIGHT_SCALE and not all(map(_are_scales, matrices.values())):
                raise ValueError(f"{kind} holds values that are negative or not finite: these are no scales")
            tensors |= {f"{module}.{kind}": matrix[0] for module, matrix in matrices.items()}
        elif kind == "qweight":
            shape = (inputs // TILE, outputs // TILE, -1)
            of_ranks = [_words(config, part, rank.view(shape), cut) for rank in ranks(kind)]
            for module, runs, piece, (rows, columns) in zip(
                part.modules, zip(*of_ranks, strict=True), cut.pieces, shapes, strict=True
            ):
                along = part.cut(kind)
                size, piece = (columns, piece) if along == "rows" else (rows // 8, piece // 8)
                [whole] = layout.join_ranks(runs, [size], cut=along, join="concatenate", pieces=[piece])
                tensors[f"{module}.qweight"] = whole.contiguous()
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


def _are_scales(values: Tensor) -> bool:
    return bool(values.isfinite().all()) and not bool((values < 0).any())


def _unit(part: Part, kind: str, group_size: int) -> int:
    """Input features that a row of a file stands for."""
    return group_size if kind == "scales_zeros" and part.cut(kind) == "rows" else 1
