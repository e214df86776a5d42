"""What the Gluon kernels compute, run as plain Python (see gluon_on_cpu): sizes, masks, splits, rings, the assembly."""

import random

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import reference, splits
from engine.kernels.int4_weights import Int4Weights, in_turns
from tests.engine.kernels import gluon_on_cpu
from tests.engine.kernels.quantized import awq, error, int4, normal

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="test_int4_gluon runs the kernels themselves")


@pytest.fixture(scope="module")
def kernels():
    names = "int4_fragments", "int4_gemv", "split_tiles", "load_order", "int4_gluon_configs", "int4_gluon"
    _, gemv, *_, gluon = gluon_on_cpu.kernels(*names)
    return {"gemv": gemv, "gluon": gluon}


def gemv(rows, warps, ahead):
    return {"kernel": "gemv", "rows": rows, "warps": warps, "ahead": ahead}


def gluon(block_m, block_n, warps, turn, ahead, ring, slot, wait, splits, **more):
    return {
        "kernel": "gluon", "block_m": block_m, "block_n": block_n, "warps": warps, "turn": turn, "ahead": ahead,
        "ring": ring, "slot": slot, "wait": wait, "splits": splits, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "config"),
    [
        (1, 72, 256, 128, gemv(1, 4, 2)),  # more tiles ahead than there are
        (5, 72, 1152, 128, gemv(2, 4, 2)),
        (8, 40, 160, 32, gemv(1, 8, 1)),
        (3, 72, 384, 64, gemv(2, 4, 1)),
        (3, 72, 384, 128, gluon(8, 64, 4, 2, 2, 4, 2, 2, 1)),
        (13, 72, 1152, 128, gluon(16, 64, 4, 4, 4, 4, 2, 2, 2)),
        (70, 192, 640, 128, gluon(64, 128, 8, 2, 2, 2, 1, 1, 3)),  # no whole number of tiles of rows, two blocks of x
        (16, 64, 512, 128, gluon(16, 64, 4, 4, 4, 4, 4, 4, 2)),  # the ring holds all
        (2, 64, 2048, 128, gluon(8, 64, 4, 2, 2, 3, 1, 1, 1)),  # the ring goes round
        (2, 64, 2048, 128, gluon(8, 64, 4, 4, 4, 6, 4, 1, 1)),  # and gives back four of six tiles at once
        (9, 72, 2048, 128, gluon(16, 64, 4, 4, 4, 4, 2, 1, 2)),
        (9, 72, 2048, 128, gluon(16, 64, 4, 8, 2, 3, 1, 1, 1)),  # fewer tiles of W ahead than a turn has
        (9, 200, 1152, 128, gluon(16, 64, 4, 2, 2, 4, 2, 2, 2, places=3)),  # three whole tiles and one split
        (70, 328, 1280, 128, gluon(64, 128, 8, 2, 2, 2, 1, 1, 4, places=4)),  # two blocks of x, two of six split
        (9, 136, 2048, 128, gluon(16, 64, 4, 1, 1, 4, 1, 1, 3, places=4)),  # all split; first parts of 12 of 16 turns
        (9, 136, 256, 128, gluon(16, 64, 4, 2, 2, 2, 2, 2, 3, places=2)),  # fewer turns than parts
        (9, 200, 512, 128, gluon(16, 64, 4, 2, 2, 4, 2, 2, 3, places=2)),  # none left to split
        (70, 584, 768, 128, gluon(64, 256, 8, 2, 2, 4, 1, 1, 2, places=4)),
        (13, 72, 1152, 128, gluon(16, 64, 4, 4, 4, 8, 4, 4, 2, scaled="sums")),
        (9, 200, 1152, 128, gluon(16, 128, 4, 2, 2, 4, 2, 2, 2, places=3, scaled="sums")),
        (2, 64, 2048, 128, gluon(8, 64, 4, 4, 4, 8, 4, 1, 1, scaled="sums")),  # a ring of two turns, tile by tile
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_that_of_the_weights(kernels, m, n, k, group, config, dtype):
    weights, x = int4(n, k, group), normal(m, k, dtype=dtype)
    exact = x.float() @ weights.dequantize(torch.float32).t()
    bias = None if m == 1 else normal(n, dtype=dtype, seed=5)
    y = kernels[config["kernel"]].run(x, weights, bias, config)
    expected = exact if bias is None else exact + bias.float()
    # gemv rounds y alone; the other rounds W to x's type as well, and bfloat16 scales before that.
    bound = 2.5e-4 if config["kernel"] == "gemv" else 3.5e-4
    assert y.dtype == dtype and error(y, expected) < bound * (10 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "config"),
    [
        (1, 80, 256, 128, gemv(1, 4, 2)),
        (5, 144, 1152, 128, gemv(2, 4, 2)),
        (3, 144, 384, 128, gluon(8, 64, 4, 2, 2, 4, 2, 2, 1)),
        (70, 208, 640, 128, gluon(64, 128, 8, 2, 2, 2, 1, 1, 3)),
        (70, 336, 1280, 128, gluon(64, 128, 8, 2, 2, 2, 1, 1, 3, places=4)),
        (3, 144, 384, 128, gluon(8, 64, 4, 2, 2, 4, 2, 2, 1, scaled="sums")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_and_up_in_turns_give_silu_times_up(kernels, m, n, k, group, config, dtype):
    gate, up, x = awq(n // 2, k, group), awq(n // 2, k, group, seed=9), normal(m, k, dtype=dtype)
    weights = Int4Weights.pack(*(in_turns(*pair) for pair in zip(gate, up, strict=True)))
    bias = None if m == 1 else normal(n, dtype=dtype, seed=5)
    y = kernels[config["kernel"]].run(x, weights, bias, config, gated=True)
    gated, through = (x.float() @ Int4Weights.pack(*part).dequantize(torch.float32).t() for part in (gate, up))
    if bias is not None:
        one, other = bias.float().view(-1, 2, 8).unbind(1)
        gated, through = gated + one.flatten(), through + other.flatten()
    assert y.shape == (m, n // 2) and y.dtype == dtype
    assert error(y, torch.nn.functional.silu(gated) * through) < (6e-4 if dtype == torch.float16 else 6e-3)


def test_what_lies_past_the_inputs_adds_nothing(kernels):
    """x has a last row that is not the product's: numbers past a row's end would be read from it."""
    weights, x = int4(64, 384, 128), normal(2, 384)
    x[1] = 60000.0
    exact = x[:1].float() @ weights.dequantize(torch.float32).t()
    assert error(kernels["gemv"].run(x[:1], weights, None, gemv(1, 4, 2)), exact) < 2.5e-4
    assert error(kernels["gluon"].run(x[:1], weights, None, gluon(8, 64, 4, 2, 2, 4, 2, 2, 1)), exact) < 3.5e-4


def test_every_code_and_zero_point_is_exact(kernels):
    """Rows of every pair of q and z, scale 1, one input each: y is q - z to the bit."""
    qweight, qzeros = torch.zeros(128, 32, dtype=torch.int32), torch.zeros(1, 32, dtype=torch.int32)
    order = torch.tensor([reference.AWQ_ORDER.index(c) for c in range(8)])
    codes = torch.arange(256)
    for row in range(256):
        q, z, shift = int(codes[row]) % 16, int(codes[row]) // 16, 4 * int(order[row % 8])
        qweight[:, row // 8] |= torch.tensor(q << shift if q << shift < 2**31 else (q << shift) - 2**32).int()
        qzeros[:, row // 8] |= torch.tensor(z << shift if z << shift < 2**31 else (z << shift) - 2**32).int()
    weights = Int4Weights.pack(qweight, qzeros, torch.ones(1, 256).half())
    expected = (codes % 16 - codes // 16).float()
    x = torch.zeros(8, 128)
    x[torch.arange(8), torch.tensor([0, 3, 17, 37, 63, 64, 101, 127])] = 1
    for dtype in (torch.float16, torch.bfloat16):
        y = kernels["gemv"].run(x.to(dtype), weights, None, gemv(1, 1, 1))
        assert torch.equal(y.float(), expected.expand(8, 256))
        for scaled in ({}, {"scaled": "sums"}):
            y = kernels["gluon"].run(x.to(dtype), weights, None, gluon(8, 64, 4, 1, 1, 1, 1, 1, 1, **scaled))
            assert torch.equal(y.float(), expected.expand(8, 256))


def test_whoever_is_last_adds_the_parts_of_a_tile_in_their_order(kernels):
    """Programs in any order: the same bits, and counts of arrivals that are zero again."""
    weights, x = int4(200, 2048, 128), normal(9, 2048)
    config, gl = gluon(16, 64, 4, 1, 1, 4, 1, 1, 4, places=3), kernels["gluon"].gl
    before, results = gl.order, []
    try:
        for seed in range(6):
            drawn = random.Random(seed)
            gl.order = lambda ids, drawn=drawn: drawn.sample(ids, len(ids))
            results.append(kernels["gluon"].run(x, weights, None, config))
    finally:
        gl.order = before
    assert all(torch.equal(results[0], y) for y in results[1:])
    assert not splits.buffers(x.device)[1].any()
