import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.kernels.reference import dequantize_kv, quantize_kv
from pipelines.quant.kv import fine_scales, layer_scales, pairs, scale_and_zero, scale_and_zero_as_reference
from tests.shared_data import shared


@pytest.mark.parametrize("tp", [1, 2])
def test_reference_arithmetic_gives_the_reference_bytes(tp):
    golden = shared("golden/turbomind-v0.1.0/llama_mha")
    statistics = load_file(golden / "calibration_stats.safetensors")
    for layer in range(2):
        ranges = [
            statistics[f"{kind}/{what}/model.layers.{layer}"].chunk(tp)
            for kind in ("key", "value")
            for what in ("min", "max")
        ]
        for rank, (k_low, k_high, v_low, v_high) in enumerate(zip(*ranges, strict=True)):
            ours = [*scale_and_zero_as_reference(k_low, k_high), *scale_and_zero_as_reference(v_low, v_high)]
            stored = golden / f"expected.kv.tp{tp}/layers.{layer}.past_kv_scale.{rank}.weight"
            assert np.array(ours, dtype="<f4").tobytes() == stored.read_bytes()
            exact = layer_scales(statistics, layer, tp=tp)[rank]
            assert exact == pytest.approx(ours, rel=2e-3, abs=1e-4) and exact != tuple(ours)


def test_the_formula():
    scale, zero = scale_and_zero(torch.tensor([-1.0, 0.0]), torch.tensor([0.5, 4.1]))
    assert scale == pytest.approx(5.1 / 255) and zero == pytest.approx(1.55)
    scale, zero = scale_and_zero(torch.tensor([-1.0]), torch.tensor([4.0]), symmetric=True)
    assert scale == pytest.approx(4 / 127) and zero == 0


@pytest.mark.parametrize("value", [0.0, 3.5, -1e4])
def test_a_range_of_one_value_is_exact(value):
    scale, zero = scale_and_zero(torch.full((2, 2), value), torch.full((2, 2), value))
    assert scale > 0 and np.float32(scale) > 0 and zero == value
    # In int8: round((x - zero) / scale) is 0, which reads back as zero.
    assert round((value - zero) / scale) * scale + zero == value


def test_a_range_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        scale_and_zero(torch.tensor([float("-inf")]), torch.tensor([1.0]))


def statistics(heads=4, size=8):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}/{what}/model.layers.0": sign * torch.rand(heads, size, generator=generator) * scale
        for kind, scale in (("key", 5.0), ("value", 2.0))
        for what, sign in (("min", -1), ("max", 1))
    }


def test_every_rank_has_the_range_of_its_own_heads():
    known = statistics()
    (first, second), (whole,) = layer_scales(known, 0, tp=2), layer_scales(known, 0, tp=1)
    low, high = known["key/min/model.layers.0"], known["key/max/model.layers.0"]
    assert first[:2] == scale_and_zero(low[:2], high[:2]) and second[:2] == scale_and_zero(low[2:], high[2:])
    assert whole[0] >= max(first[0], second[0])
    with pytest.raises(ValueError, match="4 KV heads cannot be divided over tp=3"):
        layer_scales(known, 0, tp=3)


def test_smoothing_divides_the_range_of_v_per_channel():
    known, divisor = statistics(), torch.linspace(0.5, 4, 32)
    smoothed = layer_scales(known, 0, tp=1, smoothing=divisor)[0]
    low, high = (known[f"value/{what}/model.layers.0"].flatten() / divisor for what in ("min", "max"))
    assert smoothed[2:] == scale_and_zero(low, high) and smoothed[:2] == layer_scales(known, 0, tp=1)[0][:2]


@pytest.mark.parametrize("symmetric", [False, True])
def test_heads_and_channels_have_the_pair_of_their_own_range(symmetric):
    known, divisor = statistics(), torch.linspace(0.5, 4, 32)
    heads, channels = (
        fine_scales(known, 0, granularity, smoothing=divisor, symmetric=symmetric)
        for granularity in ("head", "channel")
    )
    assert heads.shape == channels.shape == (4, 8, 4) and heads.dtype == channels.dtype == torch.float32
    for head in range(4):
        for first, kind, over in ((0, "key", torch.ones(8)), (2, "value", divisor.view(4, 8)[head])):
            low, high = (known[f"{kind}/{what}/model.layers.0"][head] / over for what in ("min", "max"))
            whole = torch.tensor(scale_and_zero(low, high, symmetric=symmetric))
            assert torch.equal(heads[head, :, first : first + 2], whole.expand(8, 2))
            for c in range(8):
                own = torch.tensor(scale_and_zero(low[c], high[c], symmetric=symmetric))
                assert torch.equal(channels[head, c, first : first + 2], own)
    for granularity in ("tensor", "token"):
        with pytest.raises(ValueError, match="no scales of heads or channels"):
            fine_scales(known, 0, granularity)


def test_smoothing_changes_no_byte_of_scales_of_channels():
    """V divided by a power of two, and its scale with it: what is stored is the same."""
    known, x = statistics(), torch.rand(50, 4, 8) - 0.5
    divisor = 2.0 ** torch.randint(-2, 3, (32,))
    plain, smoothed = (fine_scales(known, 0, "channel", smoothing=s)[..., 2:].unbind(-1) for s in (None, divisor))
    assert torch.equal(quantize_kv(x, *plain), quantize_kv(x / divisor.view(4, 8), *smoothed))


def test_a_channel_that_never_moved_is_exact_and_clamps_what_calibration_did_not_see():
    """Its scale is the float32 precision of its one value, so a later value is read as that one: nothing overflows."""
    low = torch.tensor([[0.0, 2.0, -1.0]])
    scale, zero = pairs(low, torch.tensor([[0.0, 2.0, 1.0]])).unbind(-1)
    x = torch.tensor([[[0.0, 2.0, 0.5]], [[3.0, -7.0, 9.0]], [[float("inf"), float("-inf"), float("nan")]]])
    read = dequantize_kv(quantize_kv(x, scale, zero), scale, zero)
    assert read.isfinite().all()
    assert (read[0] - x[0]).abs().max() <= scale.max() / 2
    torch.testing.assert_close(read[1:, 0, :2], torch.tensor([[0.0, 2.0]] * 2), atol=1e-3, rtol=0)
    assert read[1, 0, 2] == pytest.approx(1.0, abs=0.01) and read[2, 0, 2] == pytest.approx(0.0, abs=0.01)
