"""The Gluon kernels against the specification: they run on a GPU alone."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import int4_linear, linear_reference
from engine.kernels.device import facts
from tests.engine.kernels.quantized import error, int4, normal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")]


@pytest.mark.parametrize("m", [1, 2, 5, 8, 13, 16, 33, 64, 100, 129, 256, 513])
@pytest.mark.parametrize(("n", "k", "group"), [(72, 160, 32), (200, 384, 128), (4104, 2048, 128), (144, 512, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_that_tuning_tries(m, n, k, group, dtype):
    weights, x = int4(n, k, group, DEVICE), normal(m, k, dtype=dtype, device=DEVICE)
    bias = normal(n, dtype=dtype, device=DEVICE, seed=5)
    device = facts(x.device)
    expected = linear_reference.int4_linear(x, weights, bias)
    for config in int4_linear.candidates(m, n, k, device):
        if int4_linear.runs(config, m, dtype, weights, device):
            y = int4_linear.int4_linear(x, weights, bias, config)
            assert error(y, expected) < (2e-3 if dtype == torch.float16 else 8e-3), config
            assert torch.equal(y, int4_linear.int4_linear(x, weights, bias, config)), config
            if n % 16 == 0:
                y = int4_linear.int4_linear(x, weights, bias, config, gated=True)
                gated = linear_reference.gated_int4_linear(x, weights, bias)
                assert error(y, gated) < (3e-3 if dtype == torch.float16 else 1.2e-2), config
