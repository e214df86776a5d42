"""4-bit weights in the order in which the tensor cores take them: one layout for every kernel and every batch.

A tile is 64 rows (outputs) by 128 inputs, 4 KiB, read as 16-byte words without a gap. Within a tile lane 4r + t of warp
w holds what a matrix instruction (m16n8k16, or wgmma's left operand) wants of it: rows 16w + r and 16w + r + 8, inputs
2t and 2t + 1 of each eight. So no shuffle and no shared memory lies between the load and the instruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import reference

TILE_ROWS, TILE_INPUTS = 64, 128
TILE_WORDS = TILE_ROWS * TILE_INPUTS // 8
# Rows packed at a time: bounds what packing holds beside its result to about 12 bytes a weight of this many rows.
PACKED_ROWS = 4096
# float16 bits of 1024: under it the lowest four bits of a half are an integer's, so 1024 + z is FLOAT16_1024 | z.
FLOAT16_1024 = 0x6400


@dataclass(frozen=True)
class Int4Weights:
    """A weight [out_features, in_features] of (q - z) * s, with q and z of 4 bits and a float16 s per group of inputs.

    words int32 [N/64, K/128, 2, 4, 8, 4, 2, 2], N and K rounded up to whole tiles, indexed by tile of rows, tile of
    inputs, a, w, r, t, half, h: bits 4i + 16e (i 0..3, e 0..1) are the q of row 16w + 8*half + r and
    input 64h + 16i + 8a + 2t + e. scale_zero int32 [N/64, K/group_size, 4, 8, 2], indexed by tile of rows, group, w, r,
    half: the low half is the bits of s, the high half those of the float16 1024 + z.
    group_size divides 128: a group of another size is held as several of the greatest size that divides both.
    """

    words: Tensor
    scale_zero: Tensor
    out_features: int
    in_features: int
    group_size: int

    @classmethod
    def pack(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weights:
        """From the AWQ layout (see `unpack_int4`), on the device where those tensors lie."""
        inputs, outputs = qweight.shape[0], scales.shape[1]
        stored = inputs // scales.shape[0]
        if stored * scales.shape[0] != inputs or qzeros.shape[0] != scales.shape[0] or outputs % 8:
            raise ValueError(
                f"int4 weights of {inputs} inputs and {outputs} outputs with {scales.shape[0]} rows of scales and "
                f"{qzeros.shape[0]} of zeros: the inputs must be whole groups and the outputs a multiple of 8"
            )
        group_size = math.gcd(stored, TILE_INPUTS)
        words, scale_zero = [], []
        for first in range(0, outputs, PACKED_ROWS):
            rows = slice(first, min(first + PACKED_ROWS, outputs))
            columns = slice(rows.start // 8, rows.stop // 8)
            words.append(_pack_words(reference.unpack_nibbles(qweight[:, columns]).t()))
            zeros = reference.unpack_nibbles(qzeros[:, columns]).repeat_interleave(stored // group_size, dim=0)
            factors = scales[:, rows].repeat_interleave(stored // group_size, dim=0)
            scale_zero.append(_pack_scale_zero(factors.t(), zeros.t(), -(-inputs // TILE_INPUTS), group_size))
        return cls(torch.cat(words), torch.cat(scale_zero), outputs, inputs, group_size)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale_zero.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out_features, in_features]: (q - z) * s in float32, rounded once."""
        tiles, tile_inputs = self.words.shape[:2]
        shifts = torch.tensor([[4 * i + 16 * e for e in range(2)] for i in range(4)], dtype=torch.int32)
        q = (self.words[..., None, None] >> shifts.to(self.words.device)) & 15  # n k a w r t half h i e
        q = q.permute(0, 3, 6, 4, 1, 7, 8, 2, 5, 9).reshape(tiles * TILE_ROWS, tile_inputs * TILE_INPUTS)
        pairs = self.scale_zero.permute(0, 2, 4, 3, 1).reshape(tiles * TILE_ROWS, -1)
        scale = _half_of(pairs).float().repeat_interleave(self.group_size, dim=1)
        zero = ((pairs >> 16) & 15).repeat_interleave(self.group_size, dim=1)
        return ((q - zero).float() * scale).to(dtype)[: self.out_features, : self.in_features].contiguous()


def in_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Outputs of two weights in turns of eight, along the last dimension: of scales and biases [.., out], or of AWQ
    words [.., out/8]. A thread that holds an output of gate then holds that of up: rows r and r + 8 of a block."""
    run = 1 if gate.dtype == torch.int32 else 8
    runs = [x.reshape(*x.shape[:-1], -1, run) for x in (gate, up)]
    return torch.stack(runs, dim=-2).flatten(-3)


def _pack_words(q: Tensor) -> Tensor:
    """q 0..15 int32 [rows, inputs] -> words of whole tiles; what pads them is 0."""
    rows, inputs = q.shape
    q = torch.nn.functional.pad(q, (0, -inputs % TILE_INPUTS, 0, -rows % TILE_ROWS))
    tiles, tile_inputs = q.shape[0] // TILE_ROWS, q.shape[1] // TILE_INPUTS
    q = q.reshape(tiles, 4, 2, 8, tile_inputs, 2, 4, 2, 4, 2)  # n w half r k h i a t e
    q = q.permute(0, 4, 7, 1, 3, 8, 2, 5, 6, 9)  # n k a w r t half h i e
    words = torch.zeros(q.shape[:-2], dtype=torch.int32, device=q.device)
    for i in range(4):
        for e in range(2):
            words |= q[..., i, e] << (4 * i + 16 * e)
    return words


def _pack_scale_zero(scale: Tensor, zero: Tensor, tile_inputs: int, group_size: int) -> Tensor:
    """scale float16 and zero int32 [rows, groups]; the padding has scale 0, so that it adds nothing."""
    groups = tile_inputs * TILE_INPUTS // group_size
    bits = scale.to(torch.float16).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    pairs = bits | ((zero | FLOAT16_1024) << 16)
    pairs = torch.nn.functional.pad(pairs, (0, groups - pairs.shape[1], 0, -pairs.shape[0] % TILE_ROWS))
    return pairs.reshape(-1, 4, 2, 8, groups).permute(0, 4, 1, 3, 2).contiguous()  # n g w r half


def _half_of(pairs: Tensor) -> Tensor:
    """The float16 whose bits are the low half of each int32."""
    return pairs.contiguous().view(torch.float16).reshape(*pairs.shape, 2)[..., 0]
