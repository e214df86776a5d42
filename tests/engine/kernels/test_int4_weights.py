"""Packing keeps every weight, whatever the sizes, and puts each where the description of the layout says."""

import pytest
import torch

from engine.kernels import linear_reference, reference
from engine.kernels.int4_weights import Int4Weights
from tests.engine.kernels.quantized import awq, error, int4, normal

SHAPES = [(72, 160, 32), (64, 128, 128), (200, 288, 96), (136, 256, 64), (8, 24, 8), (16, 512, 256), (4104, 128, 128)]


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_weights_are_the_weights(n, k, group, dtype):
    tensors = awq(n, k, group)
    assert torch.equal(Int4Weights.pack(*tensors).dequantize(dtype), reference.unpack_int4(*tensors).to(dtype))


def test_a_word_holds_what_the_layout_says():
    n, k, group = 128, 256, 64
    qweight, qzeros, scales = awq(n, k, group)
    q, z = reference.unpack_nibbles(qweight).t(), reference.unpack_nibbles(qzeros).t()
    packed = Int4Weights.pack(qweight, qzeros, scales)
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        index = [int(torch.randint(size, (), generator=generator)) for size in packed.words.shape]
        tile, tile_k, a, w, r, t, half, h = index
        row, word = 64 * tile + 16 * w + 8 * half + r, int(packed.words[tuple(index)])
        for i in range(4):
            for e in range(2):
                column = 128 * tile_k + 64 * h + 16 * i + 8 * a + 2 * t + e
                assert word >> (4 * i + 16 * e) & 15 == q[row, column]
        for g in (2 * tile_k, 2 * tile_k + 1):
            pair = int(packed.scale_zero[tile, g, w, r, half])
            assert pair & 0xFFFF == int(scales[g, row].view(torch.int16)) & 0xFFFF
            assert torch.tensor(pair >> 16, dtype=torch.int16).view(torch.float16) == 1024 + z[row, g]


def test_sizes_that_do_not_fit_are_refused():
    qweight, qzeros, scales = awq(64, 128, 32)
    with pytest.raises(ValueError, match="whole groups"):
        Int4Weights.pack(qweight, qzeros, scales[:3])


def test_the_reference_product_is_that_of_the_dense_weight():
    weights, x, bias = int4(72, 160, 32), normal(3, 2, 160), normal(72)
    exact = x.double() @ weights.dequantize(torch.float32).double().t() + bias.double()
    y = linear_reference.int4_linear(x, weights, bias)
    assert y.dtype == x.dtype and error(y, exact) < 1e-3
    assert error(linear_reference.int4_linear(x, weights), exact) > 1e-2
