import pytest

from engine.config import EngineConfig, RopeScaling
from tests.engine.models.tiny import tiny_config


def test_options_override_what_the_workspace_says():
    model = tiny_config(max_position_embeddings=64, logn=True, rope_scaling=RopeScaling(kind="turbomind", factor=2.0))
    assert EngineConfig().applied_to(model) == model
    changed = EngineConfig(rope_scaling_factor=4.0, use_logn_attn=False, max_position_embeddings=32).applied_to(model)
    assert changed.rope_scaling == RopeScaling(kind="turbomind", factor=4.0)
    assert (changed.logn, changed.max_position_embeddings) == (False, 32)
    assert EngineConfig(rope_scaling_factor=0).applied_to(model).rope_scaling is None
    assert EngineConfig(rope_scaling_factor=1).applied_to(tiny_config()).rope_scaling.factor == 1


def test_a_models_own_scaling_stays():
    model = tiny_config(rope_scaling=RopeScaling(kind="linear", factor=2.0))
    assert EngineConfig(rope_scaling_factor=0).applied_to(model) == model
    with pytest.raises(ValueError, match=r"rope_scaling_factor is 2.*scaling of its own \(linear\)"):
        EngineConfig(rope_scaling_factor=2).applied_to(model)


@pytest.mark.parametrize(
    "options",
    [{"rope_scaling_factor": 0.5}, {"rope_scaling_factor": float("inf")}, {"max_position_embeddings": 0}],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .* must be"):
        EngineConfig(**options).applied_to(tiny_config())
