"""Renderings are compared with golden texts, and with those of the checkpoints' own templates where these are here."""

import json
from functools import cache
from pathlib import Path

import pytest

from engine.runtime.chat_template import ChatTemplate
from engine.runtime.tokenizer import Tokenizer
from pipelines.chat_templates import open_tokenizer, write_template
from pipelines.template_files import ENDS, NAMES, read_template
from tests.shared_data import shared
from tests.tiny_artifact import write_tokenizer

GOLDEN = Path(__file__).parent / "templates"
SYSTEM = {"role": "system", "content": "Be brief."}
ASK, REPLY, AGAIN = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "再加一？"},
)
DIALOGUES = {
    "question": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [ASK, REPLY, AGAIN],
    "system, turns": [SYSTEM, ASK, REPLY, AGAIN],
}
# Formats whose messages say by themselves whose they are, so that any order of user and assistant can be written.
MARKED = ("chatml", "internlm2", "llama3", "qwen")


@cache
def compiled(text):
    return ChatTemplate(text, source="test", special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def render(text, messages, *, add_generation_prompt=True):
    return compiled(text).render(messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("name", NAMES)
def test_renderings_are_the_golden_ones(name):
    found = {title: render(read_template(name), messages) for title, messages in DIALOGUES.items()}
    found["answered"] = render(read_template(name), [ASK, REPLY], add_generation_prompt=False)
    assert found == json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def test_every_template_has_a_golden_file_and_every_end_a_template():
    assert tuple(sorted(path.stem for path in GOLDEN.glob("*.json"))) == NAMES
    assert set(ENDS) <= set(NAMES)
    for name, end in ENDS.items():
        assert end in json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["answered"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("internlm2", "tokenizers/internlm2"),
        ("llama3", "tokenizers/llama3"),
        ("mistral", "tokenizers/mistral_v0.3"),
        ("chatml", "configs/qwen3-8b"),
        ("chatml", "configs/chat_templates/Qwen-Qwen3-0.6B.jinja"),
        ("qwen", "configs/chat_templates/Qwen-Qwen2.5-7B-Instruct.jinja"),
        ("qwen", "tokenizers/qwen2_5"),
        ("llama3", "configs/chat_templates/meta-llama-Llama-3.1-8B-Instruct.jinja"),
        ("chatml", "models/minimind2-small-llama"),
    ],
)
def test_renderings_equal_those_of_the_checkpoints_own_template(name, source):
    path = shared(f"data/{source}")
    own = path.read_text() if path.suffix == ".jinja" else own_template(path)
    for title, messages in DIALOGUES.items():
        if "system" not in title and (name == "qwen" or "minimind" in source):
            continue  # where no system message is given, Qwen2.5 and MiniMind write one of their own
        expected = render(own, messages)
        if "Llama-3.1" in source:  # writes dates into a system message of its own
            expected = "<s>" + expected[expected.index("<|start_header_id|>user") :]
            messages = [message for message in messages if message is not SYSTEM]
        assert render(read_template(name), messages) == expected, title


def own_template(folder):
    file = folder / "chat_template.jinja"
    settings = folder / "tokenizer_config.json"
    return file.read_text() if file.exists() else json.loads(settings.read_text())["chat_template"]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_order_of_roles_is_a_clear_error(name):
    text = read_template(name)
    with pytest.raises(ValueError, match=r"does not accept these messages: .*(system message|take turns)"):
        render(text, [ASK, REPLY, SYSTEM, AGAIN])
    with pytest.raises(ValueError, match=r"does not accept these messages: .*(no role tool|from tool)"):
        render(text, [ASK, {"role": "tool", "content": "4"}])
    if name not in MARKED:
        with pytest.raises(ValueError, match=r"user and assistant take turns.* turn 2 is from user"):
            render(text, [SYSTEM, ASK, AGAIN])
        with pytest.raises(ValueError, match=r"turn 1 is from assistant"):
            render(text, [REPLY, ASK])
        for messages in ([SYSTEM], [ASK, REPLY]):
            with pytest.raises(ValueError, match="last message has to be from the user"):
                render(text, messages)


@pytest.mark.parametrize("name", NAMES)
def test_content_that_is_no_text_is_an_error(name):
    for messages in (
        [SYSTEM | {"content": ["a"]}, ASK],
        [ASK | {"content": ["a"]}],
        [ASK, REPLY | {"content": 4}, ASK],
    ):
        with pytest.raises(ValueError, match="does not accept these messages"):
            render(read_template(name), messages)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"wizard is no chat template; there are baichuan2, chatml, .*vicuna"):
        read_template("wizard")


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    return tmp_path


def test_without_a_name_the_checkpoints_own_is_taken(folder):
    assert open_tokenizer(folder, None).chat([ASK]) == open_tokenizer(folder, "own").chat([ASK]) == ASK["content"]
    write_tokenizer(folder, chat_template=None)
    assert open_tokenizer(folder, None).chat_template is None
    with pytest.raises(ValueError, match=r"has no chat template, and model\.template=own asks for it: name one of"):
        open_tokenizer(folder, "own")


def test_a_named_template_is_written_in_place_of_the_checkpoints_own(folder):
    named = open_tokenizer(folder, "llama2")
    write_template(named, folder)
    again = Tokenizer(folder)
    assert again.chat([SYSTEM, ASK]) == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST]"
    assert again.chat_template == named.chat_template == read_template("llama2")
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert again.eos_token_ids == named.eos_token_ids == (1,)


def test_an_answer_ends_where_the_named_template_ends_it(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    new = Tokenizer(folder).vocab_size
    settings["added_tokens_decoder"] = {str(new): {"content": "<|im_end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert Tokenizer(folder).eos_token_ids == (1,)
    write_template(open_tokenizer(folder, "chatml"), folder)
    assert Tokenizer(folder).eos_token_ids == (1, new)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(folder):
    with pytest.raises(ValueError, match=r"ends an answer with <\|im_end\|>, which is no token of"):
        open_tokenizer(folder, "chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    with pytest.raises(ValueError, match=r"template=llama2 does not fit the tokenizer of .*'bos_token' is undefined"):
        open_tokenizer(folder, "llama2")
