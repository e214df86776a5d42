"""Rotation by blocks against Hadamard matrices written out, and what rounding gains by it."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.rotation import rotate


def sylvester(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix / size**0.5


@pytest.mark.parametrize("block", [1, 2, 8, 16])
def test_blocks_are_multiplied_by_an_orthogonal_matrix(block):
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(block), dtype=torch.float64)
    expected = (x.view(2, 3, -1, block) @ sylvester(block)).view(2, 3, 48)
    rotated = rotate(x, block)
    assert rotated.dtype == torch.float64
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate(rotated, block), x, rtol=0, atol=1e-14)
    halves = rotate(x.half(), block)
    assert halves.dtype == torch.float32
    torch.testing.assert_close(halves, expected.float(), rtol=0, atol=1e-2)


def test_without_blocks_nothing_is_touched():
    x = torch.randn(3, 5)
    assert rotate(x, 0) is x


def test_a_row_with_one_large_channel_is_rounded_finer():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 256, generator=generator)
    gate_up[:, 5] *= 40
    exact = reference.silu_and_mul(gate_up)
    errors = {}
    for block in (0, 8):
        codes, scales = reference.silu_and_mul_int8(gate_up, rotated=block)
        errors[block] = float((rotate(codes.float() * scales[:, None], block) - exact).norm())
        maxima = reference.row_maxima(gate_up, gated=True, rotated=block)
        given = reference.silu_and_mul_int8(gate_up, maxima, block)
        assert torch.equal(given[0], codes) and torch.equal(given[1], scales)
    assert errors[8] < 0.7 * errors[0]
