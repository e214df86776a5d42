"""The int8 product whose steps are shared out: on a GPU, else run as plain Python (see gluon_on_cpu)."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import int8_linear, reference, splits
from engine.kernels.device import Device, facts
from tests.engine.kernels import gluon_on_cpu
from tests.engine.kernels.quantized import codes, normal

H200 = Device("h200", (9, 0), 132)


def inputs(m, n, k, device="cpu"):
    """x, its scales, W, its scales."""
    scales = (normal(size, dtype=torch.float32, device=device).abs() / 100 for size in (m, n))
    return codes(m, k, device=device), next(scales), codes(n, k, seed=3, device=device), next(scales)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("m", [9, 16, 33, 64, 100, 256])
@pytest.mark.parametrize(("n", "k"), [(72, 160), (4104, 2048), (136, 11008)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_configurations_that_tuning_tries_have_the_bits_of_the_plain_kernel(m, n, k, dtype):
    given, bias = inputs(m, n, k, DEVICE), normal(n, dtype=dtype, device=DEVICE, seed=5)
    device = facts(given[0].device)
    for added in (None, bias):
        plain = int8_linear.int8_linear(*given, added, dtype, int8_linear.default_config(m, n, k, device))
        for config in int8_linear.candidates(m, n, k, device):
            if config["kernel"] == "shared":
                assert torch.equal(int8_linear.int8_linear(*given, added, dtype, config), plain), config
    assert not splits.buffers(given[0].device)[1].any()


@pytest.fixture(scope="module")
def module():
    if DEVICE == "cuda":
        pytest.skip("the kernel itself runs")
    return gluon_on_cpu.kernels("shared_steps", "int8_columns")[1]


def shared(block_n, block_m, block_k, warps, share, slots):
    return {
        "kernel": "shared", "block_n": block_n, "block_m": block_m, "block_k": block_k, "warps": warps, "share": share,
        "slots": slots,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (13, 72, 160, shared(64, 16, 128, 4, 1, 2)),  # one program, two columns, more inputs than steps hold
        (13, 72, 400, shared(64, 16, 128, 4, 3, 3)),  # shares that begin and end inside a column
        (9, 64, 1280, shared(64, 16, 128, 4, 7, 8)),  # one column of seven programs, a ring longer than a share
        (70, 264, 656, shared(128, 32, 128, 8, 5, 2)),  # three blocks of x
        (64, 40, 304, shared(64, 64, 256, 4, 9, 2)),  # fewer steps than programs
        (130, 520, 272, shared(256, 128, 128, 8, 2, 4)),  # whole columns between the shared ones
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bits_are_those_of_the_specification(module, m, n, k, config, dtype):
    given = inputs(m, n, k)
    given[0][0], given[2][0] = -128, -128  # the largest products
    for bias, order in ((None, list), (normal(n, dtype=dtype, seed=5) * 100, reversed)):
        expected = reference.int8_linear(*given, bias, dtype)
        for module.gl.order in (order, reversed if order is list else list):  # who is last to arrive
            assert torch.equal(module.run(*given, bias, dtype, config), expected)
    assert not splits.buffers(torch.device("cpu"))[1].any()


def test_what_lies_past_rows_and_inputs_adds_nothing(module):
    x, x_scales, weight, scales = inputs(12, 64, 176)
    rows, row_scales = x[:9], x_scales[:9]
    y = module.run(rows, row_scales, weight, scales, None, torch.float16, shared(64, 16, 256, 4, 1, 2))
    assert torch.equal(y, reference.int8_linear(rows, row_scales, weight, scales, None, torch.float16))


@pytest.mark.parametrize("m", [9, 16, 32, 64, 100, 256])
@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 11008), (72, 160)])
def test_rings_fit_the_shared_memory_of_a_multiprocessor(module, m, n, k):
    found = module.candidates(m, n, k, H200)
    assert 5 <= len(found) <= 8
    for config in found:
        step, turned = (
            (config["block_n"] + config["block_m"]) * config["block_k"],
            config["block_n"] * config["block_m"],
        )
        assert config["block_m"] >= min(m, 128) and config["slots"] >= 2
        # y is turned a few tokens at a time: what the compiler takes for it is at most half of a tile of y.
        assert config["share"] * (config["slots"] * step + turned + 2048) <= 228 * 1024
        assert module.runs(m, n, k, H200)


@pytest.mark.parametrize(
    ("m", "n", "k", "device"),
    [
        (8, 128, 256, H200),
        (257, 128, 256, H200),
        (16, 128, 264, H200),  # rows of no whole 16 bytes
        (16, 132, 256, H200),  # rows of y likewise
        (16, 128, 256, Device("a100", (8, 0), 108)),
    ],
)
def test_products_that_it_does_not_run(module, m, n, k, device):
    assert not module.candidates(m, n, k, device) and not module.runs(m, n, k, device)
