import pytest
import torch

from pipelines.quant.w4a16.rounding import quantize_groups, quantize_groups_as_reference, round_groups

BOTH = pytest.mark.parametrize("quantize", [quantize_groups, quantize_groups_as_reference])


def weight(rows=16, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@BOTH
def test_every_value_is_within_a_step(quantize):
    w = weight()
    quantized = quantize(w, 32)
    # Half a step of rounding, and at the ends of the range half a step of the zero point's rounding.
    assert ((quantized.dequantize() - w).abs() <= 1.01 * quantized.scales.repeat_interleave(32, dim=1)).all()


def test_codes_are_the_nearest_of_the_stored_grid():
    w = weight(8, 32)
    quantized = quantize_groups(w, 16)
    zeros, scales = (x.float().repeat_interleave(16, dim=1) for x in (quantized.zeros, quantized.scales))
    grid = (torch.arange(16.0) - zeros[..., None]) * scales[..., None]
    best = (grid - w[..., None]).abs().amin(dim=-1)
    assert torch.allclose((quantized.dequantize() - w).abs(), best, atol=1e-7)


def test_rounding_at_once_is_codes_and_back():
    w = weight()
    assert torch.equal(round_groups(w, 32), quantize_groups(w, 32).dequantize())


@BOTH
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25])
def test_a_constant_group_is_exact(quantize, value):
    quantized = quantize(torch.full((2, 32), value), 32)
    assert (quantized.scales > 0).all() and quantized.zeros.max() <= 15
    assert torch.allclose(quantized.dequantize(), torch.full((2, 32), value), rtol=1e-3)


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_sided_group_keeps_its_zero_point_in_range(quantize, sign):
    w = sign * (weight().abs() + 5)
    quantized = quantize(w, 32)
    assert set(quantized.zeros.unique().tolist()) <= {0, 15}
    assert (quantized.dequantize() - w).abs().max() <= quantized.scales.max()


@BOTH
def test_a_very_small_group_survives_float16(quantize):
    quantized = quantize(torch.full((1, 32), 1e-9), 32)
    assert torch.isfinite(quantized.dequantize()).all() and quantized.scales.half().min() > 0


@BOTH
def test_nan_and_values_beyond_float16_are_refused(quantize):
    broken = weight()
    broken[3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(broken, 32)
    with pytest.raises(ValueError, match="would not fit float16"):
        quantize(torch.tensor([[1e7, -1e7] * 16]), 32)


def test_reference_rounds_halves_away_from_zero_and_from_the_minimum():
    # One step is 1: 0.5 above the minimum is code 1; the nearest of the grid's two equals is -6, code 1, as well.
    w = torch.tensor([[-7.0, -6.5, 8.0, 0.0]])
    assert quantize_groups_as_reference(w, 4).codes.tolist() == [[0, 1, 15, 7]]
    assert quantize_groups(w, 4).codes.tolist() == [[0, 1, 15, 7]]
