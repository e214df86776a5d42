import json

import pytest

from engine.runtime.tokenizer import Tokenizer
from pipelines.data.conversations import render_conversations
from tests.tiny_artifact import write_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and m.content == 'bad' %}"
    "{{ raise_exception('no bad questions') }}{% endif %}"
    "<{{ m.role }}{{ '/' + m.name if m.name is defined else '' }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat_template=TEMPLATE)
    return Tokenizer(folder)


def said(path, tokenizer, *, column="messages"):
    return render_conversations({"kind": "chat", "column": column}, tokenizer, locate=lambda _: path)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def test_a_conversation_is_what_the_template_makes_of_it_without_the_start_of_an_answer(tmp_path, tokenizer):
    path = write(
        tmp_path / "chat.jsonl",
        {"messages": [message("system", "be kind"), message("user", "hi"), message("assistant", "hello")]},
        "",
        {"messages": [message("user", "bye", name="ann")], "source": "kept out"},
    )
    bos = tokenizer.chat([], add_generation_prompt=False)
    assert bos
    assert said(path, tokenizer) == [f"{bos}<system>be kind<user>hi<assistant>hello", f"{bos}<user/ann>bye"]


def test_openai_s_shapes_of_a_message(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    path = write(tmp_path / "a.jsonl", {"chat": [message("developer", parts), message("user", "", tool_calls=[])]})
    [text] = said(path, tokenizer, column="chat")
    assert text.endswith("<system>two parts<user>")


def test_files_of_a_folder_in_their_order_and_blank_conversations_left_out(tmp_path, tokenizer):
    write(tmp_path / "b.jsonl", {"messages": [message("user", "second")]})
    write(tmp_path / "a.jsonl", {"messages": [message("user", " \n")]}, {"messages": [message("user", "first")]})
    assert [text.rpartition(">")[2] for text in said(tmp_path, tokenizer)] == ["first", "second"]
    write(tmp_path / "a.jsonl", {"messages": [message("user", " ")]})
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no conversation with text in it"):
        said(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "plain"}, r"line 2 has no list of messages in 'messages' \(it has text\).*set `column`"),
        (["a"], r"line 2 has no list of messages in 'messages' \(it has list\)"),
        ({"messages": []}, r"line 2 has no messages: take the line out"),
        ({"messages": ["hi"]}, r"line 2, message 1 is no message: it is 'hi', not like"),
        ({"messages": [{"from": "human", "value": "hi"}]}, r"line 2, message 1 is no message"),
        (
            {"messages": [message("tool", "x")]},
            r"line 2, message 1 has the role 'tool': roles are system, developer, user",
        ),
        (
            {"messages": [message("user", "x"), message("assistant", None)]},
            r"line 2, message 2 has no text in `content`",
        ),
        ({"messages": [message("user", [{"type": "image_url"}])]}, r"line 2, message 1 has no text in `content`"),
        (
            {"messages": [message("assistant", "", tool_calls=[{"id": "1"}])]},
            r"line 2, message 1 has tool_calls, which no",
        ),
        ({"messages": [message("user", "bad")]}, r"line 2: .*no bad questions"),
        ('{"messages": [', r"line 2 is not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', r"line 2 has half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_said_is_named_with_its_line(tmp_path, tokenizer, row, expected):
    path = write(tmp_path / "chat.jsonl", {"messages": [message("user", "fine")]}, row)
    with pytest.raises(ValueError, match=r"chat\.jsonl, " + expected):
        said(path, tokenizer)


def test_a_model_without_a_template_is_told_of_the_templates_there_are(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, chat_template=None)
    path = write(tmp_path / "chat.jsonl", {"messages": [message("user", "hi")]})
    with pytest.raises(ValueError, match=r"kind=chat needs a chat template, .* has none: name one \(model\.template="):
        said(path, Tokenizer(folder))
