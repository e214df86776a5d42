import pytest
import torch

from pipelines.quant.observers import (
    Observer,
    channel_statistics,
    gram,
    gram_and_drift,
    head_statistics,
    join,
    with_means,
)


def test_joined_parts_are_the_whole():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    joined = with_means(join(channel_statistics(x[:13]), channel_statistics(x[13:])))
    expected = {
        "min": x.amin(0),
        "max": x.amax(0),
        "mean": x.mean(0),
        "absmax": x.abs().amax(0),
        "absmean": x.abs().mean(0),
    }
    assert set(joined) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(joined[name], values)


def test_head_statistics():
    x = torch.randn(10, 2, 4, generator=torch.Generator().manual_seed(0))
    seen = head_statistics(x)
    assert seen["min"].shape == (2, 4)
    assert torch.equal(seen["absmax"], x.abs().amax(0)) and torch.equal(seen["max"], x.amax(0))


def test_gram_of_parts_adds_up():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    joined = join(gram(x[:13]), gram(x[13:]))
    torch.testing.assert_close(joined["gram"], gram(x)["gram"])
    assert joined["tokens"] == 40


def test_drift_is_how_far_inputs_are_from_the_wanted_ones():
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator)
    joined = join(gram_and_drift(x[:13], wanted[:13]), gram_and_drift(x[13:], wanted[13:]))
    torch.testing.assert_close(joined["drift"], (wanted - x).t() @ x)
    torch.testing.assert_close(joined["gram"], x.t() @ x)


def test_half_precision_is_summed_in_float32():
    x = torch.full((5000, 1), 1.001, dtype=torch.float16)
    assert with_means(channel_statistics(x))["mean"].item() == pytest.approx(float(x[0]), rel=1e-6)


def test_an_input_that_several_linears_read_is_measured_once():
    calls = []

    def measured(x):
        calls.append(x)
        return {"tokens": torch.ones(())}

    observer = Observer(of_input=measured, of_kv=None)
    shared_input, other = torch.ones(2, 2), torch.ones(2, 2)
    for module in ("self_attn.q_proj", "self_attn.k_proj"):
        observer(module, shared_input)
    observer("self_attn.k", other)
    observer("self_attn.o_proj", other)
    assert len(calls) == 2 and set(observer.seen) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"}
