"""4-bit codes to and from the words of HF-AWQ (GEMM): 8 outputs in an int32, nibble i holding output ORDER[i]."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.quant.w4a16.rounding import GroupCodes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_codes(quantized: GroupCodes) -> dict[str, Tensor]:
    """`qweight` int32 [in, out/8], `qzeros` int32 [groups, out/8] and `scales` float16 [groups, out]."""
    return {
        "qweight": pack_nibbles(quantized.codes.t()),
        "qzeros": pack_nibbles(quantized.zeros.t()),
        "scales": quantized.scales.t().half().contiguous(),
    }


def unpack_codes(packed: dict[str, Tensor]) -> GroupCodes:
    """The way back from `pack_codes`."""
    return GroupCodes(
        codes=unpack_nibbles(packed["qweight"]).t().contiguous(),
        zeros=unpack_nibbles(packed["qzeros"]).t().contiguous(),
        scales=packed["scales"].t().float().contiguous(),
    )


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [rows, columns] in 0..15 -> int32 [rows, columns/8]."""
    rows, columns = values.shape
    lanes = values.reshape(rows, columns // 8, 8)
    words = torch.zeros(rows, columns // 8, dtype=torch.int32, device=values.device)
    for nibble, lane in enumerate(ORDER):
        words |= lanes[:, :, lane].to(torch.int32) << (4 * nibble)
    return words


def unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [rows, columns/8] -> uint8 [rows, columns]."""
    rows, columns = words.shape
    lanes = torch.empty(rows, columns, 8, dtype=torch.uint8, device=words.device)
    for nibble, lane in enumerate(ORDER):
        lanes[:, :, lane] = ((words >> (4 * nibble)) & 15).to(torch.uint8)
    return lanes.view(rows, columns * 8)
