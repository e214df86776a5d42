"""Norms, silu and rounding of rows against the reference: interpreted here, compiled where there is a GPU."""

import pytest
import torch

from engine.kernels import reference
from tests.engine.kernels.paged import DEVICE, error

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels import activation, norm

SHAPES = [(1, 8), (3, 96), (5, 333)] + ([(1, 4096), (257, 4096), (17, 11008), (2, 16384)] if DEVICE == "cuda" else [])
# The interpreter cuts bfloat16 off where a GPU rounds it.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


@pytest.fixture(params=SHAPES, ids=str)
def inputs(request):
    rows, width = request.param
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(n, width, generator=generator) * 3 for n in (rows, rows)] + [
        torch.randn(width, generator=generator)
    ]


def close(int8, expected):
    """Codes differ by one at most, and seldom: a half that other arithmetic turns the other way."""
    values, scales = (x.cpu() for x in int8)
    torch.testing.assert_close(scales, expected[1], rtol=1e-5, atol=0)
    away = (values.int() - expected[0].int()).abs()
    assert away.max() <= 1
    assert (away > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(inputs, dtype):
    x, residual, weight = (tensor.to(dtype) for tensor in inputs)
    there = [tensor.to(DEVICE) for tensor in (x, residual, weight)]
    total = x + residual
    assert error(norm.rms_norm(there[0], there[2], EPS), reference.rms_norm(x, weight, EPS)) < TOLERANCES[dtype]
    out, summed = norm.add_rms_norm(*there, EPS)
    assert torch.equal(summed.cpu(), total)
    assert error(out, reference.rms_norm(total, weight, EPS)) < TOLERANCES[dtype]
    close(norm.rms_norm_int8(there[0], there[2], EPS), reference.rms_norm_int8(x, weight, EPS))
    *int8, summed = norm.add_rms_norm_int8(*there, EPS)
    assert torch.equal(summed.cpu(), total)
    close(int8, reference.rms_norm_int8(total, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_rounding(inputs, dtype):
    gate_up = torch.cat(inputs[:2], dim=1).to(dtype)
    there = gate_up.to(DEVICE)
    assert error(activation.silu_and_mul(there), reference.silu_and_mul(gate_up)) < TOLERANCES[dtype]
    close(activation.silu_and_mul_int8(there), reference.silu_and_mul_int8(gate_up))
    close(activation.quantize_rows(there), reference.quantize_rows(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_references_to_the_bit(inputs, dtype):
    x = torch.cat(inputs[:2], dim=1).to(dtype)
    for maxima in (None, reference.row_maxima(x, gated=False) * 1.7):
        given = None if maxima is None else maxima.to(DEVICE)
        values, scales = (tensor.cpu() for tensor in activation.quantize_rows(x.to(DEVICE), given))
        expected = reference.quantize_rows(x, maxima)
        assert torch.equal(values, expected[0]) and torch.equal(scales, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_parts_of_rows_are_rounded_as_the_whole_rows(inputs, dtype, gated):
    rows = torch.cat(inputs[:2], dim=1).to(dtype)
    there = rows.to(DEVICE)
    maxima = reference.row_maxima(rows, gated=gated)
    torch.testing.assert_close(activation.row_maxima(there, gated=gated).cpu(), maxima, rtol=1e-5, atol=0)
    larger = maxima * 1.7  # another rank's
    rounded, expected = (
        kernels.silu_and_mul_int8(x, by) if gated else kernels.quantize_rows(x, by)
        for kernels, x, by in ((activation, there, larger.to(DEVICE)), (reference, rows, larger))
    )
    close(rounded, expected)
    assert expected[0].abs().max() <= 75  # 127 / 1.7
    rows[0, 0] = torch.nan
    assert activation.row_maxima(rows.to(DEVICE), gated=gated)[0].item() == torch.inf


ROTATED = [(1, 8), (2, 24), (3, 96), (4, 1000), (5, 344)] + (
    [(1, 1408), (257, 8960), (17, 11008), (2, 16384)] if DEVICE == "cuda" else []
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), ROTATED)
def test_silu_is_rotated_by_blocks_before_it_is_rounded(rows, width, dtype):
    gate_up = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    there = gate_up.to(DEVICE)
    expected = reference.silu_and_mul_int8(gate_up, rotated=8)
    close(activation.silu_and_mul_int8(there, rotated=8), expected)
    assert (expected[0] != reference.silu_and_mul_int8(gate_up)[0]).float().mean() > 0.5
    maxima = reference.row_maxima(gate_up, gated=True, rotated=8)
    found = activation.row_maxima(there, gated=True, rotated=8)
    torch.testing.assert_close(found.cpu(), maxima, rtol=1e-5, atol=0)
    larger = maxima * 1.7  # another rank's
    close(activation.silu_and_mul_int8(there, larger.to(DEVICE), 8), reference.silu_and_mul_int8(gate_up, larger, 8))
    gate_up[0, 0] = torch.nan
    spoiled = gate_up.to(DEVICE)
    assert activation.row_maxima(spoiled, gated=True, rotated=8)[0].item() == torch.inf
    assert not torch.isfinite(activation.silu_and_mul_int8(spoiled, rotated=8)[1][0])


def test_a_row_with_what_is_not_a_number_has_no_finite_scale():
    x = torch.ones(2, 40, dtype=torch.float16)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    rounded = activation.quantize_rows(x.to(DEVICE))
    normed = norm.rms_norm_int8(x.to(DEVICE), torch.ones(40, dtype=torch.float16, device=DEVICE), EPS)
    # Whatever the codes are, what is multiplied by the scale is NaN.
    assert rounded[1].isnan().all() and normed[1].isnan().all()
    maxima = activation.row_maxima(x.to(DEVICE), gated=False)
    assert maxima.isinf().all() and activation.quantize_rows(x.to(DEVICE), maxima)[1].isnan().all()


def test_a_row_of_zeros_has_a_scale():
    values, scales = activation.quantize_rows(torch.zeros(2, 40, dtype=torch.float16, device=DEVICE))
    assert not values.any()
    assert torch.equal(scales.cpu(), reference.quantize_rows(torch.zeros(2, 40))[1])
