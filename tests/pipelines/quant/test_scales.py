import torch

from pipelines.quant import scales


def test_dead_channels_take_one():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(200, 64, generator=generator)
    x[:, 3] = 0
    weight[:, 5] = 0
    scale = scales.grid_scale(x.square().mean(dim=0).sqrt(), scales.mean_in_group(weight, 32), 0.5, 0.5)
    assert scale[3] == 1 and scale[5] == 1 and torch.isfinite(scale).all() and scale.min() > 0
    absmax = x.abs().amax(dim=0)
    fixed = scales.reference_scale([weight.half()], absmax, group_size=32, alpha=0.5)
    assert fixed[3] == 1 and fixed[5] == 1 and torch.isfinite(fixed).all() and fixed.min() > 0


def test_all_dead_is_no_scaling():
    assert torch.equal(scales.grid_scale(torch.zeros(4), torch.ones(4), 0.5, 0.5), torch.ones(4))
    absent = scales.reference_scale([torch.zeros(8, 32)], torch.zeros(32), group_size=32, alpha=0.5)
    assert torch.equal(absent, torch.ones(32))


def test_grid_scale_is_normalised():
    scale = scales.grid_scale(torch.rand(64) + 0.1, torch.rand(64) + 0.1, 0.7, 0.3)
    assert abs(float((scale.max() * scale.min()).sqrt()) - 1) < 1e-5
