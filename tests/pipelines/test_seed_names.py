"""The names of the reference's chat templates, and what `convert` makes of them."""

import json
from dataclasses import replace

import pytest

from engine.runtime.tokenizer import Tokenizer
from engine.storage.workspace import TOKENIZER
from pipelines.convert import Conversion, convert
from pipelines.seed_names import SEED_NAMES
from pipelines.template_files import ENDS, NAMES, read_template
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint
from tests.shared_data import shared

OWN = "{{ messages[0].content }}"


@pytest.fixture
def asked(tmp_path):
    return Conversion(name="base", source=write_tiny_checkpoint(tmp_path / "model"), target=tmp_path / "workspace")


def with_tokens(folder, *added):
    """Make texts special tokens of a tiny checkpoint, in the place of its last ones."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"].values())
    for token_id, text in enumerate(added, last + 1 - len(added)):
        old = next(piece for piece, found in content["model"]["vocab"].items() if found == token_id)
        del content["model"]["vocab"][old]
        content["model"]["vocab"][text] = token_id
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != old]
        content["added_tokens"].append(
            {"id": token_id, "content": text, "special": True, "normalized": False, "single_word": False}
            | {"lstrip": False, "rstrip": False}
        )
    path.write_text(json.dumps(content))


def test_every_name_of_the_reference_is_there_and_every_template_is_one_of_ours():
    text = shared("spec/turbomind-v0.1.0.md").read_text()
    listed = text[text.index("### 6.7") : text.index("### 6.8")]
    assert all(name in listed for name in SEED_NAMES) and len(SEED_NAMES) == 21
    assert {name.template for name in SEED_NAMES.values()} - {None} <= set(NAMES)
    assert {name.session_len for name in SEED_NAMES.values()} == {2056, 4104, 8200}


@pytest.mark.parametrize("name", [name for name, seed in SEED_NAMES.items() if seed.template])
def test_a_name_gives_its_template_and_the_token_that_ends_an_answer(asked, name):
    template = SEED_NAMES[name].template
    ends = [ENDS[template]] if template in ENDS else []
    with_tokens(asked.source, *ends)
    before = {path.name: path.read_bytes() for path in asked.source.iterdir()}
    converted = convert(replace(asked, name=name))
    assert (converted.template, converted.warning) == (template, None)
    tokenizer = Tokenizer(asked.target / TOKENIZER)
    assert tokenizer.chat_template == read_template(template)
    assert tokenizer.eos_token_ids == (1, *(tokenizer.token_id(end) for end in ends))
    assert tokenizer.chat([{"role": "user", "content": "the cat"}]) != "the cat"
    assert converted.ini.end_id == 1 and converted.ini.session_len == SEED_NAMES[name].session_len
    assert {path.name: path.read_bytes() for path in asked.source.iterdir()} == before


@pytest.mark.parametrize("name", ["base", "internlm", "baichuan-7b", "puyu", "ultralm", "a-name-of-ones-own"])
def test_a_name_without_a_template_leaves_the_checkpoints_own(asked, name):
    converted = convert(replace(asked, name=name))
    assert (converted.template, converted.warning) == ("own", None)
    assert Tokenizer(asked.target / TOKENIZER).chat_template == OWN
    assert not (asked.target / TOKENIZER / "chat_template.jinja").exists()


def test_a_template_that_does_not_fit_is_said_and_not_written(asked):
    converted = convert(replace(asked, name="internlm-chat-7b"))
    assert converted.template == "own" and Tokenizer(asked.target / TOKENIZER).chat_template == OWN
    assert converted.warning == (
        "internlm-chat-7b stands for the chat template internlm, which does not fit this tokenizer (it has no token "
        "<eoa>): the checkpoint's own is kept"
    )
    settings = asked.source / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    bare = convert(replace(asked, name="yi", overwrite=True))
    assert bare.template is None and bare.warning.endswith(
        "(it has no token <|im_end|>): the model only completes text"
    )


def test_a_folder_that_appears_during_the_conversion_is_not_replaced(asked, monkeypatch):
    from pipelines import convert as module

    def link_repository(folder):
        asked.target.mkdir()
        (asked.target / "mine").write_text("mine")

    monkeypatch.setattr(module, "link_repository", link_repository)
    with pytest.raises(ValueError, match="exists already"):
        convert(asked)
    assert [path.name for path in asked.target.iterdir()] == ["mine"]
    assert sorted(path.name for path in asked.target.parent.iterdir()) == ["model", "workspace"]
