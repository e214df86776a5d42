"""The int8 ops against arithmetic on whole numbers, and that nothing but its own row decides what a row becomes."""

import os
import subprocess
import sys

import pytest
import torch

from engine.kernels import reference as ops


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def test_a_row_is_its_values_times_its_scale():
    x = normal(6, 40) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 1.0, 7.0])[:, None]
    values, scales = ops.quantize_rows(x)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (6,)
    assert torch.equal(scales, x.abs().amax(-1) / 127)
    assert int(values.abs().max()) == 127 and values.min() >= -127
    error = (values.double() * scales.double()[:, None] - x.double()).abs()
    assert bool((error <= scales.double()[:, None] * (0.5 + 1e-6)).all())
    assert bool((error > scales.double()[:, None] * 0.4).any())  # no finer than 8 bits


def test_halves_are_rounded_to_even_and_any_leading_shape_will_do():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    values, scales = ops.quantize_rows(x)
    assert scales.tolist() == [1.0] and values.tolist() == [[127, 0, 2, 2, 0, -2]]
    deep, deep_scales = ops.quantize_rows(x.view(1, 1, 6).expand(2, 3, 6))
    assert deep.shape == (2, 3, 6) and deep_scales.shape == (2, 3)


def test_rows_of_zeros_and_rows_that_are_not_finite_are_defined():
    x = torch.zeros(4, 3)
    x[1, 1], x[2, 0], x[3] = float("inf"), float("nan"), torch.tensor([3.0, -6.0, 1.0])
    values, scales = ops.quantize_rows(x)
    assert values[:3].tolist() == [[0, 0, 0]] * 3 and values[3].tolist() == [64, -127, 21]
    assert 0 < scales[0] < 1e-8 and scales[1].isinf() and scales[2].isnan()
    weight, weight_scales = codes(5, 3), torch.ones(5)
    out = ops.int8_linear(values, scales, weight, weight_scales, None, torch.float32)
    assert torch.equal(out[0], torch.zeros(5)) and bool(out[1:3].isnan().all()) and bool(out[3].isfinite().all())


def test_the_fused_ops_quantize_what_was_not_rounded_in_between():
    x, weight = (normal(16, 64) * 3).half(), normal(64, seed=1).half()
    values, scales = ops.rms_norm_int8(x, weight, 1e-5)
    expected = ops.quantize_rows(ops.rms_norm(x.float(), weight.float(), 1e-5))
    assert torch.equal(values, expected[0]) and torch.equal(scales, expected[1])
    rounded = ops.quantize_rows(ops.rms_norm(x, weight, 1e-5))
    assert not torch.equal(scales, rounded[1])  # float16 between would show
    values, scales = ops.silu_and_mul_int8(x)
    gate, up = x.float().chunk(2, dim=-1)
    expected = ops.quantize_rows(torch.nn.functional.silu(gate) * up)
    assert torch.equal(values, expected[0]) and torch.equal(scales, expected[1])


@pytest.mark.parametrize("inner", [1, 33, 1024, 1025, 2500])
def test_products_are_exact_at_the_ends_of_the_range(inner):
    x, weight = codes(5, inner), codes(7, inner, seed=1)
    x[0], weight[0], weight[1] = 127, 127, -128
    x[1] = -128
    assert torch.equal(ops.int8_products(x, weight).double(), x.double() @ weight.double().t())


def test_without_vnni_the_product_is_still_exact():
    """oneDNN's own int8 product saturates there, and nobody says so."""
    program = (
        "import torch; from engine.kernels import reference as ops\n"
        "x = torch.full((17, 2048), 127, dtype=torch.int8); w = torch.full((8, 2048), 127, dtype=torch.int8)\n"
        "w[::2] = -128; expected = (x.double() @ w.double().t())\n"
        "assert torch.equal(ops.int8_products(x, w).double(), expected)\n"
        "assert ops._int_mm_is_exact() == torch.equal(torch._int_mm(x, w.t()).double(), expected)\n"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_scales_bias_and_type_of_the_output():
    x, weight = codes(4, 24), codes(6, 24, seed=1)
    x_scales, weight_scales, bias = normal(4, seed=2).abs(), normal(6, seed=3).abs(), normal(6, seed=4)
    exact = (x.double() * x_scales.double()[:, None]) @ (weight.double() * weight_scales.double()[:, None]).t()
    out = ops.int8_linear(x, x_scales, weight, weight_scales, bias, torch.float32)
    assert ((out - exact - bias).abs() / exact.abs().max()).max() < 1e-6
    assert ((out - exact).abs() / exact.abs().max()).max() > 1e-6  # the bias counts
    half = ops.int8_linear(x, x_scales, weight, weight_scales, bias.half(), torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, ops.int8_linear(x, x_scales, weight, weight_scales, bias.half(), torch.float32).half())


def test_a_row_does_not_depend_on_its_company_or_on_threads():
    x, weight, scales = normal(37, 300), codes(50, 300), normal(50, seed=1).abs()

    def linear(rows):
        return ops.int8_linear(*ops.quantize_rows(rows), weight, scales, None, torch.float32)

    together, threads = linear(x), torch.get_num_threads()
    assert torch.equal(together, torch.cat([linear(row) for row in x.split(1)]))
    try:
        torch.set_num_threads(3)
        assert torch.equal(together, linear(x))
    finally:
        torch.set_num_threads(threads)
