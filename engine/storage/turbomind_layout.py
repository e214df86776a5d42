"""How TurboMind v0.1.0 lays tensors out in its weight files, as pure functions in both directions.

A matrix here is stored (in_features, out_features): the transpose of a Hugging Face linear weight. A bias is (1, out).
Rank cuts are contiguous runs. Nothing in this file knows names, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# Nibble p of an HF-AWQ word holds column 8c + AWQ_ORDER[p].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)

# fp16(64 + z) for z in 0..15: the exponent of 64 leaves the zero point in mantissa bits 4..7.
ZERO_BITS = 0x5400

Join = Literal["concatenate", "interleave"]
Cut = Literal["columns", "rows", "copies"]


def interleave_rotary(matrix: Tensor, head_dim: int) -> Tensor:
    """Turn half-split rotary columns (j, j + D/2) of every head into TurboMind's adjacent pairs (2j, 2j + 1)."""
    rows, columns = matrix.shape
    if _is_transposed(matrix):
        heads = matrix.t().reshape(columns // head_dim, 2, head_dim // 2, rows)
        return heads.transpose(1, 2).reshape(columns, rows).t()
    heads = matrix.reshape(rows, columns // head_dim, 2, head_dim // 2)
    return heads.transpose(2, 3).reshape(rows, columns)


def separate_rotary(matrix: Tensor, head_dim: int) -> Tensor:
    """Undo `interleave_rotary`."""
    rows, columns = matrix.shape
    if _is_transposed(matrix):
        heads = matrix.t().reshape(columns // head_dim, head_dim // 2, 2, rows)
        return heads.transpose(1, 2).reshape(columns, rows).t()
    heads = matrix.reshape(rows, columns // head_dim, head_dim // 2, 2)
    return heads.transpose(2, 3).reshape(rows, columns)


def rank_piece(matrix: Tensor, rank: int, size: int, *, dim: int) -> Tensor:
    """Run number `rank` of `size` rows (dim 0) or columns (dim 1); what lies beyond the matrix is zero."""
    first = min(rank * size, matrix.shape[dim])
    return widen(matrix.narrow(dim, first, min(size, matrix.shape[dim] - first)), size, dim=dim)


def split_ranks(
    matrices: Sequence[Tensor], tp: int, *, cut: Cut, join: Join, pieces: Sequence[int], stored: int
) -> list[Tensor]:
    """Cut each matrix into `tp` runs of its `pieces`, join each rank's runs, and fill them with zeros up to `stored`.

    `concatenate` puts runs one after the other along the cut (q, k, v); `interleave` alternates columns (gate, up).
    `copies` gives every rank the whole of the one matrix (the bias of a row-cut linear).
    """
    if cut == "copies":
        return [matrices[0]] * tp
    dim = 1 if cut == "columns" else 0
    ranks = []
    for rank in range(tp):
        runs = [rank_piece(matrix, rank, size, dim=dim) for matrix, size in zip(matrices, pieces, strict=True)]
        joined = torch.stack(runs, dim=-1).flatten(1) if join == "interleave" else _joined(runs, dim=dim)
        ranks.append(widen(joined, stored, dim=dim))
    return ranks


def join_ranks(
    ranks: Sequence[Tensor], sizes: Sequence[int], *, cut: Cut, join: Join, pieces: Sequence[int]
) -> list[Tensor]:
    """Undo `split_ranks`; `sizes` are those of the whole matrices along the cut."""
    if cut == "copies":
        return [ranks[0]]
    dim = 1 if cut == "columns" else 0
    used = [rank.narrow(dim, 0, sum(pieces)) for rank in ranks]
    if join == "interleave":
        runs = [rank.reshape(rank.shape[0], -1, len(pieces)).unbind(-1) for rank in used]
    else:
        runs = [torch.split(rank, list(pieces), dim=dim) for rank in used]
    joined = [torch.cat(of_rank, dim=dim) for of_rank in zip(*runs, strict=True)]
    return [matrix.narrow(dim, 0, size) for matrix, size in zip(joined, sizes, strict=True)]


def refine_groups(rows: Tensor, times: int) -> Tensor:
    """A row per group of zero points or scales -> `times` equal rows, for groups that are as many times smaller."""
    return rows.repeat_interleave(times, dim=0) if times > 1 else rows


def merge_groups(rows: Tensor, times: int) -> Tensor:
    """Undo `refine_groups`; ValueError where rows that must be equal are not."""
    if times == 1:
        return rows
    grouped = rows.reshape(-1, times, rows.shape[1])
    if not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
        raise ValueError("parts of one group have different scales or zero points: the ranks are not of one model")
    return grouped[:, 0]


def pad_rows(matrix: Tensor, multiple: int) -> Tensor:
    """Append zero rows up to a multiple (the vocabulary, which every rank reads in equal shares)."""
    missing = -matrix.shape[0] % multiple
    return torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])]) if missing else matrix


def widen(matrix: Tensor, size: int, *, dim: int) -> Tensor:
    """The matrix with zero rows (dim 0) or columns (dim 1) after it, up to `size`."""
    missing = size - matrix.shape[dim]
    if not missing:
        return matrix
    shape = (missing, matrix.shape[1]) if dim == 0 else (matrix.shape[0], missing)
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)


def transposed(matrix: Tensor) -> Tensor:
    """A 16-bit matrix that is a transposed one, made contiguous in two steps: four times as fast as in one."""
    return matrix.t().contiguous().view(torch.int16).t().contiguous().view(matrix.dtype)


def _joined(matrices: Sequence[Tensor], *, dim: int) -> Tensor:
    """`torch.cat`, moving whole rows where the matrices are transposed ones: ten times as fast as by elements."""
    if len(matrices) == 1:
        return matrices[0]
    if all(map(_is_transposed, matrices)):
        return torch.cat([matrix.t() for matrix in matrices], dim=1 - dim).t()
    return torch.cat(list(matrices), dim=dim)


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) > 1


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [..., 8] of values 0..15 -> int32 [...]; nibble p goes to bits 4p..4p+3 (little-endian hosts only)."""
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32).squeeze(-1)


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [...] -> uint8 [..., 8]; undoes `pack_nibbles`."""
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def pack_awq(values: Tensor) -> Tensor:
    """uint8 [rows, M] of values 0..15 -> int32 [rows, M/8] in the HF-AWQ GEMM order."""
    return pack_nibbles(values.reshape(*values.shape[:-1], -1, 8)[..., list(AWQ_ORDER)])


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [rows, M/8] in the HF-AWQ GEMM order -> uint8 [rows, M] in natural column order."""
    return unpack_nibbles(words)[..., list(AWQ_INVERSE)].flatten(-2)


def pack_scales_zeros(scales: Tensor, zeros: Tensor) -> Tensor:
    """fp16 scales and uint8 zero points [K/g, M] -> int32 [K/g, M]: low half fp16(64 + z), high half the scale."""
    low = zeros.to(torch.int16) << 4 | ZERO_BITS
    return torch.stack([low, scales.contiguous().view(torch.int16)], dim=-1).view(torch.int32).squeeze(-1)


def unpack_scales_zeros(words: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [K/g, M] -> (fp16 scales, uint8 zero points); ValueError when a zero point is not one of 0..15."""
    halves = words.contiguous().unsqueeze(-1).view(torch.int16)
    low = halves[..., 0]
    if bool(((low & ~0xF0) != ZERO_BITS).any()):
        raise ValueError(
            "scales_zeros hold a zero point that is not a whole number from 0 to 15: this is not int4 data"
        )
    return halves[..., 1].contiguous().view(torch.float16), (low >> 4 & 15).to(torch.uint8)
