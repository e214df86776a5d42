import torch

from pipelines.quant.stream import side_by_side
from pipelines.quant.w4a16 import awq
from pipelines.quant.w4a16.rounding import quantize_groups

EXPONENTS = [(x / 5, y / 2) for x in range(5) for y in range(3)]


def case(seed=0, outliers=True):
    """A weight, and inputs of which a few channels are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator)
    if outliers:
        x[:, ::16] *= 30
    return weight, x


def search(weight, x, storable=lambda scale: scale, exponents=EXPONENTS):
    gram = x.t() @ x / len(x)
    with side_by_side(2) as workers:
        return awq.search_scale(
            [weight],
            gram,
            group_size=32,
            activation=gram.diagonal().sqrt(),
            channel_weight=awq.mean_in_group(weight, 32),
            exponents=exponents,
            storable=storable,
            workers=workers,
        )


def test_the_gram_matrix_gives_the_output_error():
    weight, x = case()
    scale = torch.rand(64) + 0.5
    gram = x.t() @ x / len(x)
    rounded = quantize_groups(weight * scale, 32).dequantize() / scale
    direct = ((x @ (rounded - weight).t()) ** 2).sum() / len(x)
    assert abs(awq.output_error([weight], scale, gram, 32) / direct.item() - 1) < 1e-4
    assert abs(awq.output_power([weight], gram) / (((x @ weight.t()) ** 2).sum() / len(x)).item() - 1) < 1e-4


def test_search_protects_large_channels():
    choice = search(*case())
    assert choice.error < 0.7 * choice.unscaled_error
    assert choice.activation_exponent > 0 and choice.scale[::16].min() > choice.scale[1::16].max()


def test_no_scaling_is_among_the_candidates():
    # Every candidate but none is made useless: a scale that is nearly constant within no group.
    def spoiled(scale):
        return scale if torch.equal(scale, torch.ones_like(scale)) else torch.logspace(-4, 4, 64)

    choice = search(*case(outliers=False), storable=spoiled)
    assert (choice.activation_exponent, choice.weight_exponent) == (0.0, 0.0)
    assert choice.error == choice.unscaled_error and torch.equal(choice.scale, torch.ones(64))


def test_dead_channels_take_one():
    weight, x = case()
    x[:, 3] = 0
    weight[:, 5] = 0
    scale = search(weight, x, exponents=[(0.5, 0.5)]).scale
    assert scale[3] == 1 and scale[5] == 1 and torch.isfinite(scale).all() and scale.min() > 0
    absmax = x.abs().amax(dim=0)
    fixed = awq.reference_scale([weight.half()], absmax, group_size=32, alpha=0.5)
    assert fixed[3] == 1 and fixed[5] == 1 and torch.isfinite(fixed).all() and fixed.min() > 0


def test_all_dead_is_no_scaling():
    assert torch.equal(awq.grid_scale(torch.zeros(4), torch.ones(4), 0.5, 0.5), torch.ones(4))
    absent = awq.reference_scale([torch.zeros(8, 32)], torch.zeros(32), group_size=32, alpha=0.5)
    assert torch.equal(absent, torch.ones(32))


def test_grid_scale_is_normalised():
    scale = awq.grid_scale(torch.rand(64) + 0.1, torch.rand(64) + 0.1, 0.7, 0.3)
    assert abs(float((scale.max() * scale.min()).sqrt()) - 1) < 1e-5
