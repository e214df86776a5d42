import json

import pytest

from engine.config import RopeScaling
from engine.models.families import model_config
from engine.wording import LONGEST
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
    assert (config.qkv_bias, config.tie_word_embeddings, config.bos_token_id) == (False, False, None)
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
    assert (config.head_dim, config.num_kv_heads, config.tie_word_embeddings) == (24, 2, True)
    assert config.qkv_bias and config.o_bias
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


def test_the_sliding_window_of_mistral():
    assert model_config(MISTRAL).sliding_window is None
    assert model_config(MISTRAL | {"sliding_window": 77}).sliding_window == 77
    with pytest.raises(ValueError, match="sliding_window = 0"):
        model_config(MISTRAL | {"sliding_window": 0})
    silent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert model_config(silent).sliding_window == 4096
    with pytest.raises(ValueError, match="layer_types"):
        model_config(silent | {"layer_types": ["full_attention"] * 2})
    with pytest.raises(ValueError, match="attention_bias = True"):
        model_config(MISTRAL | {"attention_bias": True})


def of(architecture, **fields):
    return model_config(LLAMA | {"architectures": [architecture]} | fields)


QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "vocab_size": 100,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "rotary_emb_base": 20000,
    "use_dynamic_ntk": True,
    "use_logn_attn": False,
    "no_bias": True,
    "rotary_pct": 1.0,
}


def test_qwen_has_words_of_its_own():
    config = model_config(QWEN)
    assert (config.max_position_embeddings, config.rope_theta, config.head_dim) == (8192, 20000.0, 16)
    assert (config.intermediate_size, config.norm_eps, config.logn) == (128, 1e-6, False)
    assert config.rope_scaling == RopeScaling(kind="qwen") and config.qkv_bias and not config.o_bias
    assert model_config(QWEN | {"use_dynamic_ntk": False, "use_logn_attn": True}).rope_scaling is None
    for field, value in (
        ("no_bias", False),
        ("rotary_pct", 0.25),
        ("use_cache_quantization", True),
        ("scale_attn_weights", False),
        ("intermediate_size", 255),
    ):
        with pytest.raises(ValueError, match=f"{field} = {value}"):
            model_config(QWEN | {field: value})


def test_biases_are_what_each_architecture_says():
    def biases(architecture, **fields):
        config = of(architecture, **fields)
        return config.qkv_bias, config.o_bias

    assert biases("InternLMForCausalLM") == (True, True)
    assert biases("InternLMForCausalLM", bias=False) == (False, False)
    assert biases("InternLM2ForCausalLM", bias=False) == (False, False)
    assert biases("InternLM3ForCausalLM", qkv_bias=True, bias=False) == (True, False)
    assert biases("Qwen2ForCausalLM") == (True, False)
    assert biases("Qwen3ForCausalLM") == (False, False)
    assert biases("Qwen3ForCausalLM", attention_bias=True) == (True, True)
    with pytest.raises(ValueError, match="bias = True"):
        of("InternLM3ForCausalLM", bias=True)  # its MLP would have biases
    with pytest.raises(ValueError, match="bias = False, a field that this engine does not know"):
        of("LlamaForCausalLM", bias=False)


def test_qwen2_and_3_ignore_a_window_that_is_not_used():
    for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        config = of(architecture, use_sliding_window=False, sliding_window=4096, max_window_layers=1)
        assert config.sliding_window is None and config.qk_norm == (architecture == "Qwen3ForCausalLM")
        with pytest.raises(ValueError, match="use_sliding_window = True"):
            of(architecture, use_sliding_window=True, sliding_window=4096)


def test_baichuan_with_alibi_is_refused_by_name():
    assert of("BaichuanForCausalLM", max_position_embeddings=4096).family == "baichuan2"
    assert of("BaiChuanForCausalLM").family == "baichuan"
    with pytest.raises(ValueError, match=r"BaichuanForCausalLM has no max_position_embeddings: .*ALiBi.*13B"):
        of("BaichuanForCausalLM", model_max_length=4096)


def test_internlms_own_words_for_the_rotary_embedding():
    config = of("InternLMForCausalLM", rotary={"base": 5000, "type": "dynamic", "scaling_factor": 3.0})
    assert (config.rope_theta, config.rope_scaling) == (5000.0, RopeScaling(kind="dynamic", factor=3.0))
    assert of("InternLMForCausalLM", rotary={"base": 5000, "type": "origin"}).rope_scaling is None
    with pytest.raises(ValueError, match="rotary"):
        of("InternLMForCausalLM", rotary={"base": 5000, "type": "linear"})
    with pytest.raises(ValueError, match=r"rotary = .*does not know"):
        of("LlamaForCausalLM", rotary={"base": 5000, "type": "origin"})


def test_an_unknown_field_is_refused_and_a_harmless_one_is_not():
    for field in ("rope_interleaved", "attention_sinks", "mup_scale"):
        with pytest.raises(ValueError, match=rf"{field} = 1, a field that this engine does not know"):
            model_config(LLAMA | {field: 1})
    assert (
        model_config(LLAMA | {"pretraining_tp": 2, "use_cache": False, "auto_map": {"AutoModel": "x"}}).num_layers == 2
    )


REFUSED = [
    ("architectures", ["MixtralForCausalLM"]),
    ("architectures", ["LlamaForCausalLM", "MistralForCausalLM"]),
    ("architectures", None),
    ("hidden_act", "gelu"),
    ("mlp_bias", True),
    ("sliding_window", 4096),
    ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ("final_logit_softcapping", 30.0),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("layer_types", ["full_attention"]),
    ("layer_types", 3),
    ("architectures", [["LlamaForCausalLM"]]),
    ("rms_norm_eps", 10**400),
    ("rope_theta", 10**400),
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
    assert repr(value)[:LONGEST] in message


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="more than one base"):
        model_config(LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    with pytest.raises(ValueError, match="more than one type"):
        model_config(LLAMA | {"dtype": "float32"})


PUBLISHED = {
    "internlm-20b": {"family": "internlm", "qkv_bias": False, "rope_scaling": RopeScaling(kind="dynamic")},
    "internlm2_5-7b-chat.from_internvl2-8b": {
        "family": "internlm2",
        "num_kv_heads": 8,
        "rope_theta": 1e6,
        "rope_scaling": RopeScaling(kind="dynamic", factor=2.0),
    },
    "llama-2-7b-chat-hf": {"num_kv_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096},
    "meta-llama-3-8b-instruct": {"num_kv_heads": 8, "head_dim": 128, "rope_theta": 5e5, "vocab_size": 128256},
    "mistral-7b-instruct-v0.1": {"sliding_window": 4096, "rope_theta": 1e4},
    "mistral-7b-instruct-v0.3": {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768},
    "mistral-7b-v0.2-hf": {"sliding_window": None, "rope_theta": 1e6, "num_kv_heads": 8},
    "qwen2.5-0.5b-instruct": {"qkv_bias": True, "o_bias": False, "sliding_window": None, "tie_word_embeddings": True},
    "qwen3-8b": {"qk_norm": True, "head_dim": 128, "rope_theta": 1e6, "sliding_window": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config = model_config(json.loads((shared("data/configs") / name / "config.json").read_text()))
    plain = {"rope_scaling": None, "logn": False, "sliding_window": None, "qk_norm": False}
    for field, value in (plain | PUBLISHED[name]).items():
        assert getattr(config, field) == value, field


def test_every_published_configuration_is_in_this_test():
    folders = {path.parent.name for path in shared("data/configs").glob("*/config.json")}
    assert folders == set(PUBLISHED)
