import torch

from engine.kernels.reference import unpack_int4
from pipelines.quant.w4a16.pack import ORDER, pack_codes, pack_nibbles, unpack_codes, unpack_nibbles
from pipelines.quant.w4a16.rounding import quantize_groups


def test_nibble_i_of_a_word_holds_output_order_i():
    word = pack_nibbles(torch.arange(8, dtype=torch.uint8).view(1, 8)).item()
    assert [word >> (4 * i) & 15 for i in range(8)] == list(ORDER) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_pack_and_unpack_are_inverses():
    values = torch.randint(0, 16, (5, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values)), values)


def test_the_engine_reads_what_is_packed():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize_groups(weight, 32)
    packed = pack_codes(quantized)
    assert packed["qweight"].shape == (64, 2) and packed["qzeros"].shape == (2, 2) and packed["scales"].shape == (2, 16)
    assert torch.equal(unpack_int4(packed["qweight"], packed["qzeros"], packed["scales"]), quantized.dequantize())
    assert torch.equal(unpack_codes(packed).dequantize(), quantized.dequantize())
