import pytest

from engine.models.config_fields import DEFAULTS, HARMLESS, NEUTRAL, READ
from engine.models.families import model_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "torch_dtype": "float16",
}


def test_a_field_is_read_or_neutral_or_harmless_and_only_one_of_them():
    assert not READ & HARMLESS and not READ & NEUTRAL.keys() and not HARMLESS & NEUTRAL.keys()
    assert DEFAULTS.keys() <= READ | NEUTRAL.keys()
    assert all(DEFAULTS[name] in NEUTRAL[name] for name in DEFAULTS.keys() & NEUTRAL.keys())


@pytest.mark.parametrize("field", sorted(HARMLESS))
def test_a_harmless_field_changes_nothing_whatever_it_says(field):
    assert model_config(LLAMA | {field: ["anything", 7]}) == model_config(LLAMA)


# What a Llama's own row reads or allows otherwise.
@pytest.mark.parametrize("field", sorted(NEUTRAL.keys() - {"attention_bias", "mlp_bias"}))
def test_a_neutral_field_is_accepted_at_its_neutral_values_alone(field):
    for value in NEUTRAL[field]:
        assert model_config(LLAMA | {field: value}) == model_config(LLAMA)
    with pytest.raises(ValueError, match=field):
        model_config(LLAMA | {field: 17})


def test_a_field_of_none_of_the_three_is_refused_by_name():
    with pytest.raises(ValueError, match="brand_new_scaling = 2, a field that this engine does not know"):
        model_config(LLAMA | {"brand_new_scaling": 2})
