"""The compiled kernels of a CPU against the references, where a C compiler is there."""

import os
import subprocess
import sys

import pytest
import torch

from engine.kernels import c_library, cpu_linear, ops, reference
from engine.kernels.cpu_linear import CpuInt4Weights
from engine.models.linear import Int4Linear
from tests.engine.kernels.quantized import awq, codes, error, normal

pytestmark = pytest.mark.skipif(cpu_linear.functions() is None, reason="no C compiler is here")

# outputs, inputs, group size: tiles with and without a rest, groups from 8 up, one that is no power of two.
INT4_SHAPES = [(64, 128, 128), (200, 288, 96), (136, 256, 64), (72, 160, 32), (8, 24, 8), (1032, 512, 256)]
FLOAT32_ERROR = 1e-6


def int4_case(outputs, inputs, group, rows):
    tensors = awq(outputs, inputs, group)
    x, bias = normal(rows, inputs, dtype=torch.float32), normal(outputs, dtype=torch.float32, seed=5)
    exact = x.double() @ reference.unpack_int4(*tensors).double().t()
    return CpuInt4Weights.pack(*tensors), x, bias, exact


@pytest.mark.parametrize(("outputs", "inputs", "group"), INT4_SHAPES)
def test_int4_products_of_every_number_of_rows(outputs, inputs, group):
    weights, x, bias, exact = int4_case(outputs, inputs, group, 19)
    for rows in range(1, 20):
        assert error(cpu_linear.int4_linear(x[:rows], weights), exact[:rows]) < FLOAT32_ERROR
    assert error(cpu_linear.int4_linear(x, weights, bias), exact + bias.double()) < FLOAT32_ERROR


def test_a_row_does_not_depend_on_its_company_or_on_threads():
    weights, x, bias, _ = int4_case(2056, 1024, 64, 23)
    together, threads = cpu_linear.int4_linear(x, weights, bias), torch.get_num_threads()
    assert torch.equal(together, torch.cat([cpu_linear.int4_linear(row, weights, bias) for row in x.split(1)]))
    assert torch.equal(together, torch.cat([cpu_linear.int4_linear(rows, weights, bias) for rows in x.split(4)]))
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(together, cpu_linear.int4_linear(x, weights, bias))
    finally:
        torch.set_num_threads(threads)


def test_codes_and_scales_are_read_as_they_are():
    """A unit row picks one weight of each output: (q - z) * s, exactly, at all of a word's places."""
    tensors = awq(72, 64, 32)
    tensors[2][0, :8] = torch.tensor([0.0, 6e-8, -6.1e-5, 5.9e-5, 65504.0, -65504.0, 1.0, -0.5]).half()
    expected = reference.unpack_int4(*tensors)
    got = cpu_linear.int4_linear(torch.eye(64), CpuInt4Weights.pack(*tensors)).t()
    assert torch.equal(got, expected)


def test_packed_weights_may_lie_anywhere():
    weights, x, _, _ = int4_case(72, 160, 32, 5)
    elsewhere = torch.cat([torch.zeros(2, dtype=torch.uint8), weights.packed])[2:]
    moved = CpuInt4Weights(elsewhere, weights.out_features, weights.in_features, weights.group_size)
    assert torch.equal(cpu_linear.int4_linear(x, moved), cpu_linear.int4_linear(x, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int4_takes_and_gives_halves(dtype):
    weights, x, bias, exact = int4_case(72, 160, 32, 6)
    y = cpu_linear.int4_linear(x.view(2, 3, 160).to(dtype), weights, bias.to(dtype))
    assert y.dtype == dtype and y.shape == (2, 3, 72)
    assert error(y.view(6, 72), exact + bias.double()) < 1e-2
    assert cpu_linear.int4_linear(x[:0], weights).shape == (0, 72)


def test_a_linear_takes_the_kernel_and_lets_go_of_what_it_was_packed_from():
    tensors = awq(64, 128, 32)
    packed = Int4Linear(*tensors).packed(torch.float32)
    x = normal(3, 128, dtype=torch.float32)
    assert type(packed).__name__ == "PackedInt4Linear"
    assert torch.allclose(packed.forward(x), Int4Linear(*tensors).forward(x), atol=1e-4)
    held = [value for value in vars(packed._weights).values() if isinstance(value, torch.Tensor)]
    assert [tensor.nbytes for tensor in held] == [64 * 128 // 2 + 4 * 64 * cpu_linear.SCALE_BYTES]


def test_weights_without_a_kernel_are_left_as_they_are(monkeypatch):
    qweight, qzeros, scales = awq(16, 24, 4)
    assert not ops.packs_int4(qweight, scales, torch.float32)
    assert isinstance(Int4Linear(qweight, qzeros, scales).packed(torch.float32), Int4Linear)
    tensors = awq(16, 24, 8)
    assert ops.packs_int4(tensors[0], tensors[2], torch.float32)
    monkeypatch.setenv(cpu_linear.SWITCH, cpu_linear.EXACT)
    assert not ops.packs_int4(tensors[0], tensors[2], torch.float32)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (64, 100), (50, 300), (5, 2500), (130, 64)])
def test_int8_products_are_the_references_to_the_bit(outputs, inputs):
    weight, scales, bias = (
        codes(outputs, inputs),
        normal(outputs, seed=3).float().abs(),
        normal(outputs, seed=4).float(),
    )
    weight[::2, : inputs // 2] = -128
    for rows in (1, 2, 3, 4, 5, 6, 7, 17):
        x, x_scales = codes(rows, inputs, seed=rows), normal(rows, seed=6).float().abs()
        x[0] = 127
        for each in (None, bias):
            expected = reference.int8_linear(x, x_scales, weight, scales, each, torch.float32)
            assert torch.equal(cpu_linear.int8_linear(x, x_scales, weight, scales, each, torch.float32), expected)
        assert torch.equal(cpu_linear.int8_products(x, weight), reference.int8_products(x, weight))
        expected = reference.int8_linear(x, x_scales, weight, scales, bias.half(), torch.bfloat16)
        assert torch.equal(ops.int8_linear(x, x_scales, weight, scales, bias.half(), torch.bfloat16), expected)


def test_int8_sums_that_could_leave_int32_are_torchs():
    weight = codes(4, 8)
    assert cpu_linear.multiplies_int8(codes(2, 8), weight)
    assert not cpu_linear.multiplies_int8(torch.empty(1, 65537, dtype=torch.int8), torch.empty(1, 65537))
    assert not cpu_linear.multiplies_int8(codes(2, 4), codes(8, 4).t())
    x = torch.full((1, 65536), 127, dtype=torch.int8)
    one = torch.ones(1)
    most = cpu_linear.int8_linear(x, one, torch.full((1, 65536), -128, dtype=torch.int8), one, None, torch.float32)
    assert int(most) == -127 * 128 * 65536


def test_other_instructions_give_the_same_numbers(tmp_path):
    """A process that torch keeps to another instruction set compiles for that one: int8 is equal to the bit, and int4
    where both have FMA."""
    program = (
        "import sys, torch; from engine.kernels import cpu_linear; from tests.engine.kernels.quantized import *\n"
        "tensors = awq(200, 288, 96); x = normal(7, 288, dtype=torch.float32)\n"
        "y = cpu_linear.int4_linear(x, cpu_linear.CpuInt4Weights.pack(*tensors))\n"
        "scales = normal(57).float().abs().split((7, 50))\n"
        "z = cpu_linear.int8_linear(codes(7, 100), scales[0], codes(50, 100, seed=3), scales[1], None, torch.float32)\n"
        "torch.save([y, z], sys.argv[1])\n"
    )
    found = {}
    for each in ("best", "avx2", "default"):
        environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
        environment |= {} if each == "best" else {"ATEN_CPU_CAPABILITY": each}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / each)], env=environment, check=True)
        found[each] = torch.load(tmp_path / each, weights_only=True)
    int4, int8 = zip(*found.values(), strict=True)
    assert torch.equal(int8[0], int8[1]) and torch.equal(int8[0], int8[2])
    if c_library.instruction_flags(c_library.processor_flags(), "AVX2"):
        assert torch.equal(int4[0], int4[1])
    assert error(int4[2], int4[0]) < FLOAT32_ERROR
