"""Every model that conf/model ships composes, is pinned, and says what its config.json says where that is here."""

import json
import re
from pathlib import Path

import pytest
import yaml

from engine.models.families import model_config
from pipelines.selection import read_rows, read_selection
from pipelines.template_files import NAMES
from tests.shared_data import shared

ROOT = Path(__file__).resolve().parents[2]
HUB = {
    "baichuan2_7b_chat": ("baichuan-inc/Baichuan2-7B-Chat", "baichuan2", True),
    "internlm2_5_7b_chat": ("internlm/internlm2_5-7b-chat", "own", False),
    "internlm_chat_20b": ("internlm/internlm-chat-20b", "internlm", True),
    "internlm_chat_7b": ("internlm/internlm-chat-7b", "internlm", True),
    "llama2_7b_chat": ("meta-llama/Llama-2-7b-chat-hf", "own", False),
    "llama3_8b_instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", "own", False),
    "mistral_7b_instruct": ("mistralai/Mistral-7B-Instruct-v0.3", "own", False),
    "qwen2_5_7b_instruct": ("Qwen/Qwen2.5-7B-Instruct", "own", False),
    "qwen3_8b": ("Qwen/Qwen3-8B", "own", False),
    "qwen_7b_chat": ("Qwen/Qwen-7B-Chat", "qwen", False),
}
CONFIGS = {
    "internlm2_5_7b_chat": "internlm2_5-7b-chat.from_internvl2-8b",
    "llama2_7b_chat": "llama-2-7b-chat-hf",
    "llama3_8b_instruct": "meta-llama-3-8b-instruct",
    "mistral_7b_instruct": "mistral-7b-instruct-v0.3",
    "qwen2_5_7b_instruct": "qwen2.5-0.5b-instruct",
    "qwen3_8b": "qwen3-8b",
}


def composed(tmp_path, name, *overrides):
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(
            {
                "models": [name],
                "calibrations": ["demo_text"],
                "weights": ["w4a16"],
                "kvs": ["kv8"],
                "tps": [1],
                "evaluation": "demo",
                "overrides": list(overrides),
            }
        )
    )
    [row] = read_rows(ROOT, read_selection(tmp_path / "params.yaml"))
    return row.config.model


def test_no_other_models_are_shipped():
    assert {path.stem for path in (ROOT / "conf/model").glob("*.yaml")} == {*HUB, "demo", "local", "hub"}


@pytest.mark.parametrize("name", HUB)
def test_a_hub_model_is_pinned_to_a_commit_and_a_template(tmp_path, name):
    model = composed(tmp_path, name)
    assert (model.repo, model.template, model.allow_bin) == HUB[name]
    assert re.fullmatch(r"[0-9a-f]{40}", model.revision)
    assert model.template in (*NAMES, "own")


def test_commits_are_those_of_one_repository_each():
    revisions = [yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["revision"] for name in HUB]
    assert len(set(revisions)) == len(revisions)


def test_local_models_compose_with_their_options(tmp_path):
    assert composed(tmp_path, "demo").path == "demo/model"
    asked = ["model.path=/data/m", "model.template=chatml", "model.allow_bin=true"]
    model = composed(tmp_path, "local", *asked)
    assert (model.path, model.template, model.allow_bin) == ("/data/m", "chatml", True)
    with pytest.raises(ValueError, match=r"model\.path"):
        composed(tmp_path, "local")
    with pytest.raises(ValueError, match=r"model\.re(po|vision)"):
        composed(tmp_path, "hub")
    with pytest.raises(ValueError, match=r"model\.template=alpaca must be one of own, baichuan2, chatml, internlm"):
        composed(tmp_path, "demo", "model.template=alpaca")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_session_is_as_long_as_the_model_has_positions(tmp_path, name):
    content = json.loads((shared(f"data/configs/{CONFIGS[name]}") / "config.json").read_text())
    assert composed(tmp_path, name).session_len == model_config(content).max_position_embeddings


@pytest.mark.parametrize("name", ["internlm2_5_7b_chat", "llama3_8b_instruct", "mistral_7b_instruct", "qwen3_8b"])
def test_a_checkpoint_whose_own_template_is_asked_for_has_one(name):
    settings = shared(f"data/configs/{CONFIGS[name]}") / "tokenizer_config.json"
    assert json.loads(settings.read_text())["chat_template"]
