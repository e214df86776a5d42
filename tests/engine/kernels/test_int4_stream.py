"""What the product by few programs computes, of a norm and of plain rows, run as plain Python (see gluon_on_cpu)."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import reference
from tests.engine.kernels import gluon_on_cpu
from tests.engine.kernels.quantized import error, int4, normal

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="test_normed_linear runs the kernel itself")


@pytest.fixture(scope="module")
def kernels():
    _, gemv, _, stream = gluon_on_cpu.kernels("int4_fragments", "int4_gemv", "load_order", "int4_stream")
    return gemv, stream


def shares(rows, warps, ahead):
    return {"kernel": "gemv", "rows": rows, "warps": warps, "ahead": ahead}


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "config", "programs"),
    [
        (1, 80, 256, 128, shares(1, 4, 2), 0),  # a program a block, more warps than tiles
        (1, 144, 1152, 128, shares(1, 2, 4), 2),  # turns of five tiles a warp, the last of one warp alone
        (2, 144, 896, 32, shares(2, 2, 2), 3),
        (3, 272, 640, 64, shares(1, 1, 4), 5),  # a row of x that is not there
        (7, 144, 512, 128, shares(2, 4, 1), 1),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_computes_its_norm(kernels, m, n, k, group, config, programs, gated, dtype):
    gemv, stream = kernels
    delta, residual = normal(m, k, dtype=dtype), normal(m, k, dtype=dtype, seed=7) * 4
    norm = (normal(k, dtype=torch.float32, seed=8) * 0.1 + 1).to(dtype)
    weights, bias = int4(n, k, group), None if m == 1 else normal(n, dtype=dtype, seed=5)
    kept = residual.clone()
    y, total = stream.run_normed(
        delta, residual, norm, 1e-5, weights, bias, {**config, "programs": programs}, gated=gated
    )
    assert torch.equal(total, residual + delta) and torch.equal(residual, kept)
    normed = reference.rms_norm(total, norm, 1e-5)
    # The same rows by the product alone: the order of sums over warps is the same.
    expected = gemv.run(normed, weights, bias, config, gated=gated)
    assert torch.equal(stream.run(normed, weights, bias, {**config, "programs": programs}, gated=gated), expected)
    assert y.dtype == dtype and error(y, expected) < (2e-4 if dtype == torch.float16 else 1.5e-3)
