import json

import pytest

from engine.models.families import model_config
from tests.shared_data import shared

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": None}


def test_what_is_not_said_is_derived():
    config = model_config(LLAMA)
    assert (config.family, config.num_kv_heads, config.head_dim, config.rope_theta) == ("llama", 4, 16, 10000.0)
    assert (config.attention_bias, config.tie_word_embeddings, config.bos_token_id) == (False, False, None)
    assert config.eos_token_ids == ()


def test_what_is_said_is_taken():
    config = model_config(
        LLAMA
        | {
            "head_dim": 24,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_theta": 500,
            "max_position_embeddings": 77,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    assert (config.head_dim, config.num_kv_heads, config.attention_bias, config.tie_word_embeddings) == (
        24,
        2,
        True,
        True,
    )
    assert (config.rope_theta, config.max_position_embeddings, config.norm_eps) == (500.0, 77, 1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_both_generations_of_field_names():
    new = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    new |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_scaling": None}
    assert (model_config(new).dtype, model_config(new).rope_theta) == ("bfloat16", 5e5)
    assert model_config(LLAMA | {"dtype": "float16"}).dtype == "float16"
    assert model_config({key: value for key, value in LLAMA.items() if key != "torch_dtype"}).dtype == "float32"


def test_end_tokens_of_the_generation_config_are_added_once():
    config = model_config(LLAMA | {"eos_token_id": [5, 6]}, {"eos_token_id": [6, 9]})
    assert config.eos_token_ids == (5, 6, 9)
    assert model_config(LLAMA, {"eos_token_id": 3}).eos_token_ids == (3,)


def test_mistral_without_a_sliding_window():
    assert model_config(MISTRAL).family == "mistral"


REFUSED = [
    ("architectures", ["Qwen2ForCausalLM"]),
    ("architectures", None),
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("sliding_window", 4096),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "default", "factor": 2.0}),
    ("rope_scaling", "linear"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("final_logit_softcapping", 30.0),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("num_local_experts", 8),
    ("torch_dtype", "float64"),
    ("hidden_size", None),
    ("hidden_size", "64"),
    ("vocab_size", 0),
    ("num_hidden_layers", True),
    ("num_key_value_heads", 3),
    ("num_attention_heads", 5),
    ("head_dim", 15),
    ("rms_norm_eps", -1e-5),
    ("rope_theta", 0),
    ("attention_bias", 1),
    ("bos_token_id", "<s>"),
    ("eos_token_id", "</s>"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_is_not_computed_is_refused_by_field_and_value(field, value):
    with pytest.raises(ValueError) as caught:
        model_config(LLAMA | {field: value})
    message = str(caught.value)
    assert ("dtype" if field == "torch_dtype" else field) in message and "\n" not in message
    assert repr(value) in message or repr(sorted(set(value))) in message


def test_silence_of_mistral_means_a_sliding_window():
    with pytest.raises(ValueError, match="sliding_window = 4096"):
        model_config({key: value for key, value in MISTRAL.items() if key != "sliding_window"})
    with pytest.raises(ValueError, match="attention_bias = True"):
        model_config(MISTRAL | {"attention_bias": True})


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="more than one base"):
        model_config(LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    with pytest.raises(ValueError, match="more than one type"):
        model_config(LLAMA | {"dtype": "float32"})


def test_published_configurations():
    def read(name):
        return json.loads((shared("data/configs") / name / "config.json").read_text())

    llama3 = model_config(read("meta-llama-3-8b-instruct"))
    assert (llama3.num_kv_heads, llama3.head_dim, llama3.rope_theta, llama3.vocab_size) == (8, 128, 5e5, 128256)
    assert model_config(read("llama-2-7b-chat-hf")).num_kv_heads == 32
    assert model_config(read("mistral-7b-instruct-v0.3")).num_kv_heads == 8
    for name, field in (("mistral-7b-instruct-v0.1", "sliding_window"), ("qwen3-8b", "architectures")):
        with pytest.raises(ValueError, match=field):
            model_config(read(name))
