from dataclasses import replace

import pytest
import torch

from pipelines.quant.observers import gram, gram_and_drift
from pipelines.quant.scales import mean_in_group
from pipelines.quant.stream import side_by_side
from pipelines.quant.w4a16 import awq
from pipelines.quant.w4a16.search import Method, quantize_linears

EXPONENTS = tuple((x / 5, y / 2) for x in range(5) for y in range(3))
AWQ = Method(group_size=32, feedback=False, clip=False, exponents=EXPONENTS)
METHODS = {"awq": AWQ, "awq clip": replace(AWQ, clip=True), "awq+gptq": Method(group_size=32, exponents=EXPONENTS)}


def case(outliers=True):
    """Two weights, and inputs of which a few channels are far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (24, 8)]
    x = torch.randn(200, 64, generator=generator)
    if outliers:
        x[:, ::16] *= 30
    return weights, x


def search(weights, x, method, storable=lambda scale: scale, workers_count=2, wanted=None):
    seen = gram(x) if wanted is None else gram_and_drift(x, wanted)
    power = (seen["gram"].diagonal() / seen["tokens"]).sqrt()
    tried = awq.candidates(power, mean_in_group(torch.cat(weights), 32), method.exponents, storable)
    with side_by_side(workers_count) as workers:
        return quantize_linears(weights, seen, tried, method, workers)


def direct_error(weights, x, chosen):
    """The error of the outputs, computed from the inputs themselves."""
    stored = torch.cat([codes.dequantize() for codes in chosen.codes]) / chosen.candidate.scale
    weight = torch.cat(weights)
    return float((x @ (stored - weight).t()).square().sum() / (x @ weight.t()).square().sum())


@pytest.mark.parametrize("name", METHODS)
def test_large_channels_are_protected_and_the_error_is_that_of_the_outputs(name):
    weights, x = case()
    chosen = search(weights, x, METHODS[name])
    # Feedback minimises the error with damping, which the direct one has not.
    assert direct_error(weights, x, chosen) == pytest.approx(chosen.error, rel=0.2 if "gptq" in name else 1e-3)
    assert chosen.error < 0.7 * chosen.unscaled_error <= 0.7 * chosen.rounded_error * 1.0001
    assert chosen.candidate.x > 0 and chosen.candidate.scale[::16].min() > chosen.candidate.scale[1::16].max()
    assert [len(codes.codes) for codes in chosen.codes] == [24, 8]


@pytest.mark.parametrize("name", METHODS)
def test_no_scaling_is_kept_where_every_other_is_worse(name):
    def spoiled(scale):
        return scale if torch.equal(scale, torch.ones_like(scale)) else torch.logspace(-4, 4, 64)

    chosen = search(*case(outliers=False), METHODS[name], storable=spoiled)
    assert (chosen.candidate.x, chosen.candidate.y) == (0.0, 0.0)
    assert chosen.error == chosen.unscaled_error and torch.equal(chosen.candidate.scale, torch.ones(64))


def test_clipping_and_feedback_each_leave_less():
    weights, x = case(outliers=False)
    x = x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(3))  # channels that know of each other
    errors = {name: search(weights, x, method).error for name, method in METHODS.items()}
    assert errors["awq clip"] < 0.97 * errors["awq"] and errors["awq+gptq"] < 0.8 * errors["awq clip"]


def test_drift_is_made_up_for():
    weights, wanted = case(outliers=False)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) / 8
    x = wanted + 0.5 * wanted @ noise
    left = {}
    for correction in (0.0, 0.5, 1.0):
        chosen = search(weights, x, replace(METHODS["awq+gptq"], correction=correction), wanted=wanted)
        stored = torch.cat([codes.dequantize() for codes in chosen.codes]) / chosen.candidate.scale
        left[correction] = float((x @ stored.t() - wanted @ torch.cat(weights).t()).norm())
    assert left[1.0] < 0.7 * left[0.5] < 0.7 * 0.8 * left[0.0]


def test_the_number_of_workers_changes_no_bit():
    one, two = (search(*case(), METHODS["awq+gptq"], workers_count=count) for count in (1, 3))
    assert one.candidate.x == two.candidate.x and one.error == two.error
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(one.codes, two.codes, strict=True))


def test_inputs_of_zeros_round_to_nearest():
    weights, x = case()
    chosen = search(weights, torch.zeros_like(x), METHODS["awq+gptq"])
    assert torch.isfinite(chosen.codes[0].dequantize()).all() and chosen.rounded_error == 0
