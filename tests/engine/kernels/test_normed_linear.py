"""Products of a norm against their specification: two kernels without a GPU, every configuration with one."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import int4_linear, linear_reference, normed_linear, reference
from engine.kernels.device import facts
from tests.engine.kernels.quantized import codes, error, int4, normal

DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
SHAPES = [(72, 160, 32), (208, 384, 128)] + ([(4112, 2048, 128), (256, 4096, 64)] if DEVICE == "cuda" else [])
INT8_SHAPES = [(33, 80), (72, 1280)] + ([(4100, 4096), (256, 11008)] if DEVICE == "cuda" else [])
EPS = 1e-5


def stream(m, k, dtype):
    """A delta, a residual stream and the weight of a norm."""
    norm = normal(k, dtype=torch.float32, seed=8) * 0.1 + 1
    return [x.to(DEVICE, dtype) for x in (normal(m, k), normal(m, k, seed=7) * 4, norm)]


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 8, 9] if DEVICE == "cuda" else [0, 3])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4(m, n, k, group, dtype):
    delta, residual, norm = stream(m, k, dtype)
    weights, bias, kept = int4(n, k, group, DEVICE), normal(n, dtype=dtype, device=DEVICE, seed=5), residual.clone()
    for gated in (False, True) if n % 16 == 0 else (False,):
        expected, stream_after = linear_reference.normed_int4_linear(
            delta, residual, norm, EPS, weights, bias, gated=gated
        )
        for config in (None, *normed_linear.int4_candidates(m, n, k, facts(delta.device))):
            given = (delta, residual, norm, EPS, weights, bias, config)
            y, total = normed_linear.normed_int4_linear(*given, gated=gated)
            assert y.shape == expected.shape and y.dtype == dtype
            assert torch.equal(total, stream_after) and torch.equal(residual, kept), config
            if m:
                assert error(y, expected) < (3e-3 if dtype == torch.float16 else 1.2e-2), config
                assert torch.equal(y, normed_linear.normed_int4_linear(*given, gated=gated)[0]), config


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5] if DEVICE == "cuda" else [0, 3])
@pytest.mark.parametrize(
    ("n", "k"), [(33, 80), (72, 1280)] + ([(4100, 4096), (256, 11008)] if DEVICE == "cuda" else [])
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(m, n, k, dtype):
    delta, residual, norm = stream(m, k, dtype)
    weight, scales = codes(n, k, device=DEVICE), normal(n, dtype=torch.float32, device=DEVICE).abs() / 100
    bias, kept = normal(n, dtype=dtype, device=DEVICE, seed=5), residual.clone()
    bound = 2e-3 if dtype == torch.float16 else 8e-3
    for config in (None, *normed_linear.int8_candidates(m, facts(delta.device))):
        y, total = normed_linear.normed_int8_linear(delta, residual, norm, EPS, weight, scales, bias, config)
        assert torch.equal(total, residual + delta) and torch.equal(residual, kept), config
        rows = reference.rms_norm_int8(total, norm, EPS)
        expected = reference.int8_linear(*rows, weight, scales, bias, torch.float32)
        assert y.dtype == dtype and (not m or error(y, expected) < bound), config
        y = normed_linear.rounded_int8_linear(delta, weight, scales, bias, config)
        rows = reference.quantize_rows(delta)
        expected = reference.int8_linear(*rows, weight, scales, bias, torch.float32)
        assert y.dtype == dtype and (not m or error(y, expected) < bound), config
        gate_up = torch.cat((delta, residual), dim=1)
        for rotated in (0, 8):
            y = normed_linear.gated_int8_linear(gate_up, weight, scales, bias, config, rotated=rotated)
            rows = reference.silu_and_mul_int8(gate_up, rotated=rotated)
            expected = reference.int8_linear(*rows, weight, scales, bias, torch.float32)
            assert y.dtype == dtype and (not m or error(y, expected) < bound), (config, rotated)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("k", [4096, 11008])
def test_int8_rows_that_are_rounded_by_the_product(k):
    """The codes are those of `quantize_rows`: to the bit, which the sum of a product with a unit matrix shows."""
    x, weight = normal(4, k, device=DEVICE), torch.eye(k, dtype=torch.int8, device=DEVICE)
    values, _ = reference.quantize_rows(x)
    config = {"kernel": "gemv", "rows": 2, "warps": 8, "ahead": 8, "programs": 264}
    largest = x.float().abs().amax(-1, keepdim=True) / 127
    y = normed_linear.rounded_int8_linear(x, weight, torch.ones(k, device=DEVICE), None, config)
    assert torch.equal((y.float() / largest).round().to(torch.int8), values)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("m", [1, 4])
def test_one_kernel_gives_what_two_give(m):
    """To the bit where the sums of squares have the order of the norm's: 512 inputs a warp."""
    delta, residual, norm = stream(m, 4096, torch.float16)
    weights = int4(512, 4096, 128, DEVICE)
    config = {"kernel": "gemv", "rows": 1, "warps": 8, "ahead": 4}
    normed, _ = normed_linear.add_rms_norm(delta, residual, norm, EPS)
    apart = int4_linear.int4_linear(normed, weights, None, config)
    y, _ = normed_linear.normed_int4_linear(delta, residual, norm, EPS, weights, None, {**config, "programs": 8})
    assert torch.equal(y, apart)
