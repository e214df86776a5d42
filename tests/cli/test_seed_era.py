"""Workspaces as LMDeploy left them, v0.0.x to v0.1.0: plain folders without a manifest and without a chat template."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Tokenizers

from cli.main import main
from cli.target import find_target, open_tokenizer
from engine.config import EngineConfig, Sampling
from engine.runtime.engine import Engine
from engine.storage.reshard import reshard
from engine.storage.workspace import CONFIG_INI, TOKENIZER, WEIGHTS, Workspace
from tests.cli.test_seed import GOLDEN
from tests.cli.test_serve import server
from tests.shared_data import shared
from tests.tiny_artifact import write_tiny_artifact

# What the converters of the time wrote, in their order; only values of the golden model are filled in.
FIRST = """[llama]
model_name = llama2
head_num = 4
size_per_head = 128
vocab_size = 601
num_layer = 2
rotary_embedding = 128
inter_size = 768
norm_eps = 1e-06
attn_bias = 0
start_id = 1
end_id = 2
weight_type = fp16
max_batch_size = 32
max_context_token_num = 4
session_len = 2056
step_length = 1
cache_max_entry_count = 48
cache_chunk_size = 8
use_context_fmha = 1
quant_policy = 0

"""
BEFORE_PAGES = FIRST.replace("head_num = 4\n", "head_num = 4\nkv_head_num = 4\n").replace(
    "quant_policy = 0\n",
    "quant_policy = 0\ntensor_para_size = 1\nmax_position_embeddings = 2048\nuse_dynamic_ntk = 0\nuse_logn_attn = 0\n",
)
ASKED = "<s>[INST] hello [/INST]"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seed") / "workspace"
    assert main(["convert", "llama2", str(shared(f"{GOLDEN}/checkpoint")), "--dst-path", str(folder)]) == 0
    return folder


def seed_era(target: Path, converted: Path, ini: str | None = None) -> Path:
    """The folder as the reference writes it: its weights (those of ours are equal), its code, no template of ours."""
    shutil.copytree(converted, target, symlinks=True)
    (target / TOKENIZER / "chat_template.jinja").unlink()
    (target / TOKENIZER / "generation_config.json").unlink()
    for name in ("tokenizer.py", "modeling.py"):
        (target / TOKENIZER / name).write_text("raise SystemExit('code of a workspace was run')\n")
    (target / "service_docker_up.sh").write_text("#!/bin/sh\n")
    theirs = shared(f"{GOLDEN}/expected.fp16.tp1.config.ini").read_text() if ini is None else ini
    (target / WEIGHTS / CONFIG_INI).write_text(theirs)
    return target


def logits_of(folder: Path) -> tuple[int, ...]:
    engine = Engine.from_workspace(folder, EngineConfig(max_batch_size=1, cache_max_entry_count=33))
    [completion] = engine.generate([[1, 5, 9, 2]], Sampling(max_new_tokens=4, temperature=0, ignore_eos=True))
    return completion.token_ids


@pytest.mark.parametrize("ini", [FIRST, BEFORE_PAGES, None], ids=["v0.0.1", "v0.0.9", "v0.1.0"])
def test_it_is_served_as_it_is_and_says_that_nobody_verified_it(tmp_path: Path, converted: Path, ini: str) -> None:
    folder = seed_era(tmp_path / "workspace", converted, ini)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert logits_of(folder) == logits_of(converted)
    if ini is not FIRST:
        return
    with server(f"folder={folder}", "serve.session_len=64") as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            [model] = api.models.list()
            assert (model.id, model.artifact_id, model.verified, model.verdict) == ("workspace", None, False, None)
            messages = [{"role": "user", "content": "hello"}]
            answer = api.chat.completions.create(model="workspace", messages=messages, max_tokens=3)
            assert answer.usage.prompt_tokens == len(open_target(folder).encode(ASKED, add_special=False))
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert f"UNVERIFIED FOLDER {folder}" in said
    assert "chat template llama2, which model_name llama2 of config.ini stands for" in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def open_target(folder: Path):
    return open_tokenizer(find_target(artifact=None, folder=str(folder), waiver=None, store=None))


def test_what_an_old_config_ini_leaves_out_is_what_its_engine_took(tmp_path: Path, converted: Path) -> None:
    folder = seed_era(tmp_path / "one", converted, FIRST)
    ini = Workspace(folder).ini
    assert (ini.kv_head_num, ini.tensor_para_size, ini.rope_theta) == (4, 1, 10000.0)
    assert (ini.cache_max_entry_count, ini.cache_block_seq_len, ini.max_position_embeddings) == (0.5, 128, 0)
    two = tmp_path / "two"
    reshard(folder, two, 2)
    text = (two / WEIGHTS / CONFIG_INI).read_text()
    assert text == FIRST.replace("[llama]\n", "[llama]\ntensor_para_size = 2\n")
    (two / WEIGHTS / CONFIG_INI).write_text(FIRST)
    assert Workspace(two).tp == 2, "counted, as its files say"
    assert logits_of(two) == logits_of(converted)


def test_dynamic_ntk_of_turbomind_1_is_qwens(tmp_path: Path, converted: Path) -> None:
    asked = BEFORE_PAGES.replace("use_dynamic_ntk = 0", "use_dynamic_ntk = 1")
    folder = seed_era(tmp_path / "workspace", converted, asked)
    scaling = Workspace(folder).config.rope_scaling
    assert scaling is not None and scaling.kind == "qwen"
    for wrong, words in (
        (asked.replace("use_dynamic_ntk = 1", "use_dynamic_ntk = 2"), "use_dynamic_ntk = '2' is out of range"),
        (asked + "cache_block_seq_len = 128\n", "unknown key use_dynamic_ntk"),  # v0.1.0 has no such key
        (FIRST.replace("head_num = 4\n", ""), "head_num, kv_head_num is missing"),
    ):
        (folder / WEIGHTS / CONFIG_INI).write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(words)):
            Workspace(folder)


def test_symmetric_kv_scales_of_two_numbers_are_read_where_all_files_have_two(tmp_path: Path, converted: Path) -> None:
    asked = BEFORE_PAGES.replace("quant_policy = 0", "quant_policy = 4")
    folder = seed_era(tmp_path / "workspace", converted, asked)
    files = [folder / WEIGHTS / f"layers.{layer}.past_kv_scale.0.weight" for layer in range(2)]
    for at, file in enumerate(files):
        np.array([0.02 + at, 0.03], dtype="<f4").tofile(file)
    scales = Workspace(folder).kv_scales()
    rows = torch.cat([scales.key[:, 0, 0], scales.value[:, 0, 0]], dim=-1)
    torch.testing.assert_close(rows, torch.tensor([[0.02, 0, 0.03, 0], [1.02, 0, 0.03, 0]]))
    assert logits_of(folder)
    np.array([0.02, 0, 0.03, 0], dtype="<f4").tofile(files[0])
    with pytest.raises(ValueError, match=r"layers\.1\.past_kv_scale\.0\.weight has 8 bytes where 16 are expected"):
        Workspace(folder).kv_scales()


def plain(folder: Path, model_name: str, *, end: str | None = None, template: str | None = None) -> Path:
    """A tiny folder of that name; with `end`, as the token that ends an answer."""
    write_tiny_artifact(folder, chat_template=template)
    (folder / "manifest.json").unlink()
    ini = folder / WEIGHTS / CONFIG_INI
    ini.write_text(re.sub("model_name = .*", f"model_name = {model_name}", ini.read_text()))
    if end:
        file = str(folder / TOKENIZER / "tokenizer.json")
        content = Tokenizers.from_file(file)
        content.add_special_tokens([AddedToken(end, special=True)])
        content.save(file)
    return folder


def test_a_name_brings_its_template_and_the_token_that_ends_an_answer(tmp_path: Path, capsys) -> None:
    named = plain(tmp_path / "named", "yi", end="<|im_end|>")
    tokenizer = open_target(named)
    end = tokenizer.token_id("<|im_end|>")
    assert end in tokenizer.eos_token_ids
    assert tokenizer.chat([{"role": "user", "content": "a"}]).startswith("<|im_start|>user\na<|im_end|>")
    # The tiny model has no logit for a token that was added to its tokenizer: another id is drawn here.
    config = EngineConfig(max_batch_size=1, cache_max_entry_count=33, end_ids=(end, 5))
    ends = Engine.from_workspace(named, config).eos_token_ids
    assert 5 in ends
    assert end not in ends
    assert "chat template chatml, which model_name yi" in capsys.readouterr().err

    assert open_target(plain(tmp_path / "without", "yi")).chat_template is None
    assert "no chat template chatml, which model_name yi of config.ini stands for" in capsys.readouterr().err
    for name, template, kept in (("my-model", None, None), ("llama2", "{{ messages }}", "{{ messages }}")):
        assert open_target(plain(tmp_path / name, name, template=template)).chat_template == kept
        assert "chat template" not in capsys.readouterr().err
    assert json.loads((named / TOKENIZER / "tokenizer_config.json").read_text()).get("chat_template") is None
