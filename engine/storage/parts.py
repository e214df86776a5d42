"""A part of a layer as its rank files hold it, made from canonical tensors and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage import turbomind_files as files
from engine.storage import turbomind_layout as layout
from engine.storage.config_ini import weight_type_of
from engine.storage.rank_cuts import rank_cut
from engine.storage.turbomind_files import Part


def split_part(
    config: ModelConfig,
    recipe: Recipe,
    part: Part,
    kind: str,
    ask: Callable[[str, tuple[int, ...]], Tensor],
    *,
    tp: int,
) -> list[Tensor]:
    """What the files of one kind of a part hold, rank by rank; `ask(name, shape)` gives tensors, named in the layer."""
    cut, along = rank_cut(config, recipe, part.modules, tp), part.cut(kind)
    unit = _unit(part, kind, cut.group_size)

    def gather(source: str) -> list[Tensor]:
        matrices = []
        for module in part.modules:
            outputs, inputs = names.linear_shape(config, module)
            groups = inputs // max(recipe.group_size, 1)
            shape = {
                "weight": (outputs, inputs),
                "bias": (outputs,),
                "qweight": (inputs, outputs // 8),
                "qzeros": (groups, outputs // 8),
                "scales": (groups, outputs),
            }[source]
            if source == "bias" and not names.has_bias(config, module):
                matrices.append(torch.zeros(1, outputs, dtype=files.FLOAT_TYPES[weight_type_of(config, recipe)]))
                continue
            found = ask(f"{module}.{source}", shape)
            if source in ("qweight", "qzeros"):
                matrix = layout.unpack_awq(found)
            else:
                matrix = {"weight": found.t(), "bias": found.reshape(1, -1)}.get(source, found)
            if unit > 1:
                matrix = layout.refine_groups(matrix, recipe.group_size // unit)
            matrices.append(layout.interleave_rotary(matrix, config.head_dim) if module in part.rotary else matrix)
        pieces, stored = [piece // unit for piece in cut.pieces], cut.stored // unit
        return layout.split_ranks(matrices, tp, cut=along, join=part.join, pieces=pieces, stored=stored)

    if kind == "qweight":
        return [layout.pack_tiles(codes) for codes in gather("qweight")]
    if kind == "scales_zeros":
        pairs = zip(gather("scales"), gather("qzeros"), strict=True)
        return [layout.pack_scales_zeros(scales, zeros) for scales, zeros in pairs]
    return gather(kind)


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


def _unit(part: Part, kind: str, group_size: int) -> int:
    """Input features that a row of a file stands for."""
    return group_size if kind == "scales_zeros" and part.cut(kind) == "rows" else 1
