import torch

from engine.models.rope import rope_tables
from tests.engine.models.tiny import tiny_config


def exact_tables(config, positions):
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = positions.double()[:, None] / config.rope_theta**exponents
    return angles.cos(), angles.sin()


def test_tables_against_float64():
    for head_dim, theta in ((8, 10000.0), (48, 10000.0), (128, 1e6)):
        config = tiny_config(head_dim=head_dim, rope_theta=theta)
        positions = torch.tensor([0, 1, 2, 77, 4095, 32768])
        cos, sin = rope_tables(config, positions)
        assert cos.shape == sin.shape == (6, head_dim // 2) and cos.dtype == torch.float32
        exact_cos, exact_sin = exact_tables(config, positions)
        # A float32 angle is within a few units in the last place of the exact one.
        allowed = (positions.double() * 2.0**-22 + 1e-7)[:, None]
        assert ((cos - exact_cos).abs() <= allowed).all() and ((sin - exact_sin).abs() <= allowed).all()
        wrong = exact_tables(tiny_config(head_dim=head_dim, rope_theta=theta * 1.001), positions)
        assert ((cos - wrong[0]).abs() > allowed).any()


def test_tables_in_another_type():
    cos, sin = rope_tables(tiny_config(), torch.arange(3), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
