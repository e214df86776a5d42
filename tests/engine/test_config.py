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
    [
        {"rope_scaling_factor": 0.5},
        {"rope_scaling_factor": float("inf")},
        {"rope_scaling_factor": "2"},
        {"max_position_embeddings": 0},
        {"use_logn_attn": 2},
        {"quant_policy": 8},
        {"dtype": "int4"},
        {"device": 3},
        {"prefix_caching": 1},
        {"session_len": -1},
        {"max_batch_size": 2.0},
        {"num_tokens_per_iter": True},
        {"cache_block_seq_len": "64"},
        {"cache_max_entry_count": -0.5},
        {"cache_max_entry_count": 2.5},
        {"cache_max_entry_count": "2"},
    ],
)
def test_values_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .* must be"):
        EngineConfig(**options)


def test_what_is_left_open_is_taken_and_what_is_said_stays():
    said = EngineConfig(
        session_len=9, max_batch_size=8, cache_max_entry_count=0.25, quant_policy=4, rope_scaling_factor=2
    )
    assert EngineConfig().over(said) == said
    mine = EngineConfig(session_len=5, cache_max_entry_count="1GB", quant_policy=0, rope_scaling_factor=0)
    assert mine.over(said) == EngineConfig(
        session_len=5, max_batch_size=8, cache_max_entry_count="1GB", quant_policy=0, rope_scaling_factor=0
    )
    assert EngineConfig(use_logn_attn=False).over(EngineConfig(use_logn_attn=True)).use_logn_attn is False
    complete = EngineConfig(max_batch_size=3).complete()
    assert complete.max_batch_size == 3
    assert min(complete.num_tokens_per_iter, complete.cache_max_entry_count, complete.cache_block_seq_len) > 0
