"""The int4 product whose steps are shared out, run as plain Python (see gluon_on_cpu)."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import splits
from engine.kernels.device import Device
from engine.kernels.int4_weights import Int4Weights, in_turns
from tests.engine.kernels import gluon_on_cpu
from tests.engine.kernels.quantized import awq, error, int4, normal

H200 = Device("h200", (9, 0), 132)
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="test_int4_gluon runs the kernel itself")


@pytest.fixture(scope="module")
def module():
    return gluon_on_cpu.kernels("int4_fragments", "shared_steps", "int4_columns")[2]


def columns(block_n, block_m, warps, turn, share, slots):
    return {
        "kernel": "columns", "block_n": block_n, "block_m": block_m, "warps": warps, "turn": turn, "share": share,
        "slots": slots,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (16, 72, 384, columns(64, 16, 4, 2, 1, 2)),  # one program, two columns, a turn past the inputs
        (13, 264, 1152, columns(128, 16, 8, 2, 7, 3)),  # parts of one to three programs a column, fewer rows than x has
        (70, 200, 640, columns(128, 32, 4, 1, 4, 2)),  # three blocks of x
        (40, 592, 1024, columns(256, 64, 8, 4, 3, 5)),  # shares that end inside a column
        (33, 64, 1792, columns(256, 64, 16, 2, 9, 12)),  # one column of seven programs, rings of more than a share
        (16, 520, 256, columns(64, 16, 4, 2, 2, 4)),  # whole columns
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_whose_steps_are_shared_out(module, m, n, k, config, dtype):
    weights, x = int4(n, k, 128), normal(m, k, dtype=dtype)
    exact = x.float() @ weights.dequantize(torch.float32).t()
    for bias, order in ((None, list), (normal(n, dtype=dtype, seed=5), reversed)):
        module.gl.order = order  # the last or the first program of a column sums it
        y = module.run(x, weights, bias, config)
        expected = exact if bias is None else exact + bias.float()
        assert y.dtype == dtype and error(y, expected) < (3.5e-4 if dtype == torch.float16 else 3.5e-3)
        module.gl.order = reversed if order is list else list
        assert torch.equal(y, module.run(x, weights, bias, config))  # whoever is last adds in the same order
    assert not splits.buffers(x.device)[1].any()


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [(16, 144, 384, columns(64, 16, 4, 2, 1, 2)), (70, 208, 640, columns(128, 64, 8, 4, 5, 2))],
)
def test_gate_and_up_in_turns_give_silu_times_up(module, m, n, k, config):
    gate, up, x = awq(n // 2, k, 128), awq(n // 2, k, 128, seed=9), normal(m, k)
    weights, bias = Int4Weights.pack(*(in_turns(*pair) for pair in zip(gate, up, strict=True))), normal(n, seed=5)
    y = module.run(x, weights, bias, config, gated=True)
    gated, through = (x.float() @ Int4Weights.pack(*part).dequantize(torch.float32).t() for part in (gate, up))
    one, other = bias.float().view(-1, 2, 8).unbind(1)
    expected = torch.nn.functional.silu(gated + one.flatten()) * (through + other.flatten())
    assert y.shape == (m, n // 2) and error(y, expected) < 6e-4


def test_what_lies_past_the_inputs_adds_nothing(module):
    """x has a last row that is not the product's: numbers past a row's end would be read from it."""
    weights, x = int4(64, 384, 128), normal(10, 384)
    x[9] = 60000.0
    exact = x[:9].float() @ weights.dequantize(torch.float32).t()
    assert error(module.run(x[:9], weights, None, columns(64, 16, 4, 4, 1, 2)), exact) < 3.5e-4


@pytest.mark.parametrize("m", [9, 16, 32, 64, 100, 256, 512])
@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 11008), (72, 160)])
def test_rings_fit_the_shared_memory_of_a_multiprocessor(module, m, n, k):
    found = module.candidates(m, n, k, H200)
    assert len(found) >= 5 and module.default_config(m, int4(72, 256, 128), H200) == found[0]
    for config in found:
        ring = config["slots"] * module.slot_bytes(config["block_n"], config["block_m"])
        # Turning y takes 4 KB a group of four warps.
        assert config["share"] * (ring + 2048 * config["warps"] // 4 + 2048) <= 227 * 1024
        assert config["slots"] >= 2 and config["warps"] * 16 <= config["block_n"] and config["block_m"] >= min(m, 128)
    assert not module.candidates(8, n, k, H200)
