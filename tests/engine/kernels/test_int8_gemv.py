"""What the int8 product of few rows computes, run as plain Python (see gluon_on_cpu)."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import reference
from tests.engine.kernels import gluon_on_cpu
from tests.engine.kernels.quantized import codes, error, normal

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="test_normed_linear runs the kernel itself")


@pytest.fixture(scope="module")
def gemv():
    return gluon_on_cpu.kernels("int4_fragments", "load_order", "int8_gemv")[2]


def shares(rows, warps, ahead, programs):
    return {"kernel": "gemv", "rows": rows, "warps": warps, "ahead": ahead, "programs": programs}


CASES = [
    (1, 33, 512, shares(1, 2, 8, 5)),  # more chunks ahead than a turn has, rows that fill no turn
    (2, 72, 1280, shares(2, 2, 2, 4)),  # an inner chunk that is not whole
    (3, 40, 80, shares(4, 1, 2, 3)),  # a row of x that is not there
    (4, 50, 2048, shares(2, 4, 3, 99)),  # a program a turn
]


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_codes(gemv, m, n, k, config, dtype):
    x, weight = codes(m, k), codes(n, k, seed=3)
    x_scales, scales = (normal(size, dtype=torch.float32).abs() / 100 for size in (m, n))
    for bias in (None, normal(n, dtype=dtype, seed=5) * 100):
        y = gemv.multiply_codes(x, x_scales, weight, scales, bias, dtype, config)
        assert torch.equal(y, reference.int8_linear(x, x_scales, weight, scales, bias, dtype))


@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_rows(gemv, m, n, k, config, dtype):
    x, weight, scales = normal(m, k, dtype=dtype), codes(n, k, seed=3), normal(n, dtype=torch.float32).abs() / 100
    x[m - 1, 1:] = 0
    bias = None if m == 1 else normal(n, dtype=dtype, seed=5)
    y = gemv.multiply_rows(x, weight, scales, bias, config)
    assert torch.equal(y, reference.int8_linear(*reference.quantize_rows(x), weight, scales, bias, dtype))


@pytest.mark.parametrize("rotated", [0, 8])
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_gate_and_up(gemv, m, n, k, config, dtype, rotated):
    gate_up, weight = normal(m, 2 * k, dtype=dtype) * 2, codes(n, k, seed=3)
    scales, bias = normal(n, dtype=torch.float32).abs() / 100, None if m == 1 else normal(n, dtype=dtype, seed=5)
    y = gemv.multiply_gated(gate_up, weight, scales, bias, config, rotated=rotated)
    # A half may turn the other way: torch has another exponential.
    rows = reference.silu_and_mul_int8(gate_up, rotated=rotated)
    expected = reference.int8_linear(*rows, weight, scales, bias, torch.float32)
    assert y.dtype == dtype and error(y, expected) < (6e-4 if dtype == torch.float16 else 4e-3)


def test_rows_of_zeros_and_of_numbers_that_are_none(gemv):
    weight, scales, config = codes(16, 64), torch.ones(16), shares(1, 1, 1, 2)
    assert not gemv.multiply_rows(torch.zeros(1, 64).half(), weight, scales, None, config).any()
    x = normal(1, 64)
    for broken in (float("inf"), float("nan")):
        x[0, 3] = broken
        assert not torch.isfinite(gemv.multiply_rows(x, weight, scales, None, config)).any()


@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_the_norm_of_a_stream(gemv, m, n, k, config, dtype):
    delta, residual = normal(m, k, dtype=dtype), normal(m, k, dtype=dtype, seed=7) * 4
    norm = (normal(k, dtype=torch.float32, seed=8) * 0.1 + 1).to(dtype)
    weight, scales = codes(n, k, seed=3), normal(n, dtype=torch.float32).abs() / 100
    bias, kept = None if m == 1 else normal(n, dtype=dtype, seed=5), residual.clone()
    y, total = gemv.multiply_normed(delta, residual, norm, 1e-5, weight, scales, bias, config)
    assert torch.equal(total, residual + delta) and torch.equal(residual, kept)
    rows = reference.rms_norm_int8(total, norm, 1e-5)
    expected = reference.int8_linear(*rows, weight, scales, bias, torch.float32)
    assert y.dtype == dtype and error(y, expected) < (6e-4 if dtype == torch.float16 else 4e-3)
