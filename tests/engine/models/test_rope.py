import dataclasses
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.config import RopeScaling
from engine.models.batch import packed
from engine.models.families import model_config
from engine.models.rope import frequencies, rope_tables
from engine.models.rope_scaling import rope_base
from tests.engine.models.tiny import tiny_config


def at(positions):
    return dataclasses.replace(packed([[0] * len(positions)]), positions=positions)


def exact_tables(config, positions):
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = positions.double()[:, None] / config.rope_theta**exponents
    return angles.cos(), angles.sin()


def test_tables_against_float64():
    for head_dim, theta in ((8, 10000.0), (48, 10000.0), (128, 1e6)):
        config = tiny_config(head_dim=head_dim, rope_theta=theta)
        positions = torch.tensor([0, 1, 2, 77, 4095, 32768])
        cos, sin, _ = rope_tables(config, at(positions))
        assert cos.shape == sin.shape == (6, head_dim // 2) and cos.dtype == torch.float32
        exact_cos, exact_sin = exact_tables(config, positions)
        # A float32 angle is within a few units in the last place of the exact one.
        allowed = (positions.double() * 2.0**-22 + 1e-7)[:, None]
        assert ((cos - exact_cos).abs() <= allowed).all() and ((sin - exact_sin).abs() <= allowed).all()
        wrong = exact_tables(tiny_config(head_dim=head_dim, rope_theta=theta * 1.001), positions)
        assert ((cos - wrong[0]).abs() > allowed).any()


def test_tables_in_another_type():
    cos, sin, _ = rope_tables(tiny_config(), at(torch.arange(3)), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16


KINDS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, numbers": {"factor": 16.0, "beta_fast": 24, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, one ramp": {"factor": 40.0, "original_max_position_embeddings": 40, "truncate": False},
}


@pytest.mark.parametrize("name", KINDS)
def test_scaled_frequencies_are_those_of_transformers(name):
    kind = name.partition(",")[0]
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5} | KINDS[name],
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    config = model_config(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    found = frequencies(config, config.rope_theta)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert config.rope_scaling.attention_factor == pytest.approx(factor)
    assert not torch.allclose(found, frequencies(dataclasses.replace(config, rope_scaling=None), 5e5), rtol=1e-2)
    cos, sin, _ = rope_tables(config, at(torch.tensor([3])))
    assert torch.allclose((cos**2 + sin**2).sqrt(), torch.tensor(factor), rtol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "qwen", "turbomind"])
def test_the_base_of_each_sequence_is_its_own(kind):
    scaling = RopeScaling(kind=kind, factor=2.0)
    config = tiny_config(rope_scaling=scaling, max_position_embeddings=16, head_dim=8)
    lengths = [9, 40, 17]
    batch = packed([[0] * length for length in lengths])
    tables = rope_tables(config, batch)
    given = torch.tensor([rope_base(config, length) for length in lengths], dtype=torch.float64)
    assert all(
        torch.equal(a, b)
        for a, b in zip(rope_tables(config, dataclasses.replace(batch, rope_bases=given))[:2], tables[:2], strict=True)
    )
    for row, cos, sin in zip(range(3), tables.cos.split(lengths), tables.sin.split(lengths), strict=True):
        exact = exact_tables(dataclasses.replace(config, rope_theta=float(given[row])), torch.arange(lengths[row]))
        assert (cos - exact[0]).abs().max() < 1e-5 and (sin - exact[1]).abs().max() < 1e-5
    assert len(set(given.tolist())) > 1


def test_logn_against_float64():
    config = tiny_config(logn=True, max_position_embeddings=2048)
    positions = torch.tensor([0, 1, 2046, 2047, 2048, 4095, 32767])
    scale = rope_tables(config, at(positions)).query_scale
    exact = [max(math.log2(t) / math.log2(2048), 1.0) for t in (positions + 1).tolist()]
    assert scale.dtype == torch.float32
    assert (scale.double() - torch.tensor(exact, dtype=torch.float64)).abs().max() < 1e-6
    assert scale[:4].tolist() == [1, 1, 1, 1] and scale[4] > 1 and scale[6] > 1.3
    assert rope_tables(tiny_config(), at(positions)).query_scale is None
