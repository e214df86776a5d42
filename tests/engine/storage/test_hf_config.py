import json
from dataclasses import replace

import pytest
from transformers import AutoConfig

from engine.config import RopeScaling
from engine.models.families import model_config
from engine.storage.hf_config import hf_config
from tests.engine.storage.tiny_workspace import SMALL

LLAMA3 = RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=1.25, beta_fast=16.0)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, eos_token_ids=(2, 5), rope_theta=5e5, hidden_size=96),
        replace(SMALL, qkv_bias=True, o_bias=True, bos_token_id=None, eos_token_ids=()),
        replace(SMALL, family="mistral", sliding_window=64),
        replace(SMALL, family="qwen3", qk_norm=True),
        replace(SMALL, family="qwen3", qk_norm=True, qkv_bias=True, o_bias=True, rope_scaling=YARN),
        replace(SMALL, rope_scaling=LLAMA3),
        replace(SMALL, rope_scaling=RopeScaling(kind="linear", factor=2.0)),
        replace(SMALL, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)),
    ],
    ids=lambda config: config.family,
)
def test_what_is_written_is_read_as_the_same_model(tmp_path, config):
    written = hf_config(config, tied=False)
    assert model_config(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__.lower().startswith(config.family)
    assert theirs.head_dim == config.head_dim and theirs.rope_parameters["rope_theta"] == config.rope_theta
    kind = "default" if config.rope_scaling is None else config.rope_scaling.kind
    assert theirs.rope_parameters["rope_type"] == kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logn": True}, "has logn attention"),
        ({"sliding_window": 8, "qk_norm": True}, "a sliding window beside biases or norms over heads"),
        ({"qkv_bias": True}, "biases of only some of q, k, v and o"),
        ({"rope_scaling": RopeScaling(kind="turbomind", factor=2.0)}, "as turbomind does"),
    ],
)
def test_what_no_config_says_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config(replace(SMALL, **changes), tied=False)
