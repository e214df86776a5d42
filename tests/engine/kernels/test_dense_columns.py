"""The Gluon kernel of dense products against the specification: on a GPU, else as plain Python (see gluon_on_cpu)."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import dense_linear, splits
from engine.kernels.device import Device, facts
from tests.engine.kernels import gluon_on_cpu
from tests.engine.kernels.quantized import error, normal


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("m", [1, 5, 16, 33, 64, 100, 256])
@pytest.mark.parametrize(("n", "k"), [(72, 160), (4104, 2048), (33, 72)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_configurations_that_tuning_tries(m, n, k, dtype):
    x, weight = normal(m, k, dtype=dtype, device=DEVICE), normal(n, k, dtype=dtype, device=DEVICE, seed=3)
    bias = normal(n, dtype=dtype, device=DEVICE, seed=5)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    for config in dense_linear.candidates(m, n, k, facts(x.device))[::3]:
        y = dense_linear.dense_linear(x, weight, bias, config)
        assert error(y, expected) < (1e-3 if dtype == torch.float16 else 6e-3), config
        assert torch.equal(y, dense_linear.dense_linear(x, weight, bias, config)), config
    assert not splits.buffers(x.device)[1].any()


@pytest.fixture(scope="module")
def module():
    if DEVICE == "cuda":
        pytest.skip("the kernel itself runs")
    return gluon_on_cpu.kernels("shared_steps", "dense_columns")[1]


def columns(block_n, block_m, block_k, share, slots):
    return {
        "kernel": "columns", "block_n": block_n, "block_m": block_m, "block_k": block_k, "share": share,
        "slots": slots, "warps": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (3, 72, 160, columns(64, 8, 64, 1, 2)),  # one program, two columns, more inputs than steps hold
        (3, 72, 160, columns(64, 8, 64, 4, 3)),  # shares that begin and end inside a column
        (1, 64, 640, columns(64, 8, 64, 7, 8)),  # one column of seven programs, a ring of more steps than a share has
        (17, 200, 304, columns(128, 32, 128, 5, 2)),
        (70, 136, 256, columns(64, 32, 64, 5, 3)),  # three blocks of x
        (64, 33, 72, columns(64, 64, 64, 9, 2)),  # fewer steps than programs
        (5, 520, 96, columns(64, 8, 64, 2, 4)),  # whole columns between the shared ones
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_product_whose_steps_are_shared_out(module, m, n, k, config, dtype):
    x, weight = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, seed=3)
    for bias, order in ((None, list), (normal(n, dtype=dtype, seed=5), reversed)):
        module.gl.order = order  # the last or the first program of a column sums it
        y = module.run(x, weight, bias, config)
        expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        assert y.dtype == dtype and error(y, expected) < (3e-4 if dtype == torch.float16 else 3e-3)
        module.gl.order = reversed if order is list else list
        assert torch.equal(y, module.run(x, weight, bias, config))
    assert not splits.buffers(x.device)[1].any()


@pytest.mark.parametrize("m", [1, 2, 8, 16, 64, 100, 256])
@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 11008), (103168, 4096), (72, 160)])
def test_rings_fit_the_shared_memory_of_a_multiprocessor(module, m, n, k):
    found = module.candidates(m, n, k, Device("h200", (9, 0), 132))
    assert 4 <= len(found) <= 13
    for config in found:
        step = (config["block_n"] + config["block_m"]) * config["block_k"] * 2
        assert config["block_m"] >= min(m, 128) and config["slots"] >= 2
        assert config["share"] * (config["slots"] * step + 1024) <= 227 * 1024
    assert not module.candidates(m, n, k + 4, Device("h200", (9, 0), 132))  # rows of no whole 16 bytes
    assert not module.candidates(m, n, k, Device("a100", (8, 0), 108))
