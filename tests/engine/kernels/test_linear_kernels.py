"""The matrix products in Triton against their specification, at sizes that fill no tile."""

import pytest
import torch

from tests.engine.kernels.triton_device import DEVICE  # before any kernel

# isort: split
from engine.kernels import dense_linear, int4_linear, int8_linear, linear_reference, reference, splits, tuning
from engine.kernels.device import Device, facts
from engine.kernels.int4_weights import Int4Weights, in_turns
from tests.engine.kernels.quantized import awq, codes, error, int4, normal

# The interpreter multiplies no bfloat16 (Triton 3.6) and cuts it where a GPU rounds.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def plain(splits=1, block_n=64, block_m=16):
    return {
        "kernel": "triton", "block_n": block_n, "block_m": block_m, "splits": splits, "warps": 4, "stages": 2
    }  # fmt: skip


def columns(splits=1, block_m=16):
    return {
        "kernel": "columns", "block_n": 64, "block_m": block_m, "block_k": 128, "splits": splits, "warps": 4,
        "stages": 2,
    }  # fmt: skip


TILES = {
    "kernel": "tiles", "block_m": 64, "block_n": 64, "block_k": 128, "group_m": 2, "warps": 4, "stages": 2
}  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "config"),
    [
        (1, 72, 160, 32, plain()),
        (3, 64, 128, 128, plain()),
        (17, 200, 288, 96, plain(splits=3)),
        (5, 136, 256, 64, plain(splits=2, block_n=128)),
        (2, 8, 24, 8, plain()),
        (33, 64, 640, 128, plain(splits=16, block_m=32)),
        (2, 72, 256, 128, {"kernel": "dense"}),
        (0, 72, 256, 128, None),
        (6, 72, 256, 128, None),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_linear(m, n, k, group, config, dtype):
    weights, x = int4(n, k, group, DEVICE), normal(m, k, dtype=dtype, device=DEVICE)
    for bias in (None, normal(n, dtype=dtype, device=DEVICE, seed=5)):
        y = int4_linear.int4_linear(x, weights, bias, config)
        assert y.dtype == dtype
        if m:
            assert error(y, linear_reference.int4_linear(x, weights, bias)) < (1e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.parametrize("config", [plain(splits=2), {"kernel": "dense"}, None])
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_in_turns(config, bias):
    gate, up, x = awq(72, 256, 64, DEVICE), awq(72, 256, 64, DEVICE, seed=9), normal(5, 256, device=DEVICE)
    weights = Int4Weights.pack(*(in_turns(*pair) for pair in zip(gate, up, strict=True)))
    biases = [normal(72, device=DEVICE, seed=seed) for seed in (5, 6)] if bias else None
    turned = None if biases is None else in_turns(*biases)
    expected = reference.silu_and_mul(
        torch.cat(
            [
                linear_reference.int4_linear(x.float(), Int4Weights.pack(*part), None if bias is None else bias.float())
                for part, bias in zip((gate, up), biases or (None, None), strict=True)
            ],
            dim=1,
        )
    )
    assert torch.equal(linear_reference.gated_int4_linear(x, weights, turned), expected.half())
    y = int4_linear.int4_linear(x, weights, turned, config, gated=True)
    assert y.shape == (5, 72) and error(y, expected) < 2e-3
    assert int4_linear.int4_linear(x[:0], weights, turned, config, gated=True).shape == (0, 72)


@pytest.mark.parametrize(("n", "k", "group"), [(72, 160, 32), (200, 288, 96), (8, 24, 8), (64, 256, 128)])
def test_dequantized_weights_are_those_of_the_reference(n, k, group):
    weights = int4(n, k, group, DEVICE)
    for dtype in DTYPES:
        assert torch.equal(int4_linear.dequantize(weights, dtype), weights.dequantize(dtype))


def test_leading_dimensions_stay():
    weights, x = int4(64, 128, 32, DEVICE), normal(2, 3, 128, device=DEVICE)
    y = int4_linear.int4_linear(x, weights)
    assert y.shape == (2, 3, 64)
    assert torch.equal(y[1], int4_linear.int4_linear(x[1], weights))


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 72, 160, columns()),
        (3, 64, 128, columns(splits=2)),
        (17, 200, 304, columns(splits=3, block_m=32)),
        (5, 33, 72, columns()),
        (130, 136, 256, TILES),
        (70, 200, 144, TILES),
        (0, 64, 128, None),
        (9, 64, 128, None),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear(m, n, k, config, dtype):
    x, weight = codes(m, k, device=DEVICE), codes(n, k, device=DEVICE, seed=3)
    x_scales = normal(m, dtype=torch.float32, device=DEVICE).abs() / 1000
    scales = normal(n, dtype=torch.float32, device=DEVICE).abs()
    for bias in (None, normal(n, dtype=dtype, device=DEVICE, seed=5) * 100):
        # A card that lacks the copy engine does not run its kernel.
        runnable = config is None or int8_linear.runs(config, m, n, k, facts(x.device)) or DEVICE == "cpu"
        if config is TILES and DEVICE == "cpu":
            y = int8_linear._run_tiles(x, x_scales, weight, scales, bias, dtype, config)
        else:
            y = int8_linear.int8_linear(x, x_scales, weight, scales, bias, dtype, config if runnable else None)
        expected = reference.int8_linear(x, x_scales, weight, scales, bias, dtype)
        assert y.dtype == dtype
        if m:  # the integers are equal; a fused multiplication and addition may round the rest otherwise
            assert error(y, expected) < (1e-4 if dtype == torch.float16 else 1e-3)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_linear(m, dtype):
    n, k = 67, 200
    x, weight = normal(m, k, dtype=dtype, device=DEVICE), normal(n, k, dtype=dtype, device=DEVICE, seed=3)
    rows = {"kernel": "rows", "block_n": 4, "block_k": 128, "warps": 4}
    for bias in (None, normal(n, dtype=dtype, device=DEVICE, seed=5)):
        for config in (None, rows):  # five rows are more than the kernel takes: the library's
            y = dense_linear.dense_linear(x, weight, bias, config)
            assert error(y, linear_reference.dense_linear(x, weight, bias)) < (1e-3 if dtype == torch.float16 else 5e-3)


def test_a_split_sum_leaves_the_counts_of_arrivals_at_zero():
    weights, x = int4(200, 640, 128, DEVICE), normal(3, 640, device=DEVICE)
    first = int4_linear.int4_linear(x, weights, config=plain(splits=5))
    assert torch.equal(first, int4_linear.int4_linear(x, weights, config=plain(splits=5)))
    assert not splits.buffers(x.device)[1].any()


def test_splits_fit_the_steps_and_the_buffers():
    assert splits.fitting(8, tiles=10, tile_floats=64 * 16, steps=3) == 3
    assert splits.fitting(8, tiles=splits.TILES + 1, tile_floats=1, steps=9) == 1
    assert splits.fitting(8, tiles=1024, tile_floats=64 * 128, steps=9) == 2


H200 = Device("h200", (9, 0), 132)


@pytest.mark.parametrize("m", tuning.BUCKETS)
def test_every_configuration_that_tuning_tries_names_a_kernel(m):
    for config in int4_linear.candidates(m, 4096, 4096, facts(torch.device("cpu"))):
        assert config["kernel"] in ("gemv", "gluon", "stream", "triton", "dense")
    for config in int8_linear.candidates(m, 4096, 4096, H200):
        assert config["kernel"] in ("gemv", "shared", "columns", "tiles", "library")
        assert int8_linear.runs(config, m, 4096, 4096, H200)
    for config in dense_linear.candidates(m, 4096, 4096, H200):
        assert config["kernel"] in ("rows", "columns", "library")
        assert dense_linear.runs(config, m, 4096, 4096, H200)
