"""Tokenizers. One file over 300 lines: every format goes through the same texts."""

import io
import json
import time
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.runtime.token_bytes import byte_level_alphabet
from engine.runtime.tokenizer import IncrementalDecoder, Tokenizer
from tests.shared_data import shared

NAMES = [
    "models/stories15M-llama",
    "models/stories260K-llama",
    "models/minimind2-small-llama",
    "tokenizers/llama3",
    "tokenizers/mistral_v0.3",
    "tokenizers/qwen2_5",
]
TEXTS = [
    "Once upon a time, there was a little girl named",
    "  two spaces, a tab\tand\n\nlines ",
    "",
    " ",
    "你好，世界！今天天气不错。",
    "def f(x):\n\treturn x ** 2  # 平方\n",
    "😀👩‍👩‍👧 naïve é ﷽ \u0000",
    "<s> [INST] hi</s> there",
    "<|im_start|>user\nhi<|im_end|>\n",
]
DIALOGUE = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "你好"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer trained here, with a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog 你好 😀"] * 4, trainer)
    backend.enable_truncation(4)
    backend.save(str(path / "tokenizer.json"))
    write_settings(path, chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


def write_settings(path: Path, **settings: object) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))


def copied(folder: Path, to: Path, **settings: object) -> Path:
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    write_settings(to, **settings)
    return to


@pytest.mark.parametrize("name", NAMES)
def test_ids_texts_and_chat_equal_transformers(name: str) -> None:
    path = shared(f"data/{name}")
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(path)), Tokenizer(path)
    for text in [*TEXTS, *broken_texts()]:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, add_special=special) == ids, text
            assert ours.decode(ids, skip_special=special) == theirs.decode(ids, skip_special_tokens=special), text
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids
    assert ours.vocab_size == len(theirs)
    if theirs.chat_template:
        assert ours.chat(DIALOGUE) == theirs.apply_chat_template(DIALOGUE, add_generation_prompt=True, tokenize=False)
        assert ours.encode_chat(DIALOGUE) == theirs.apply_chat_template(DIALOGUE, add_generation_prompt=True).input_ids


def broken_texts() -> list[str]:
    """Broken UTF-8 as a str can hold it, with U+FFFD in its place. (Half a surrogate pair is refused: see below.)"""
    whole = "naïve 汉字😀 <s>".encode()
    cut = [whole[:i] + whole[i + 1 :] for i in range(len(whole))] + [b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x98"]
    return [data.decode(errors="replace") for data in cut]


def test_internlm2_without_its_remote_code() -> None:
    """AutoTokenizer would run the folder's own class here; the same file read by transformers' general one."""
    path = shared("data/tokenizers/internlm2")
    transformers = pytest.importorskip("transformers")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **named)
    ours = Tokenizer(path)
    for text in [*(text for text in TEXTS if "<|im" not in text), *broken_texts()]:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, add_special=special) == ids, text
            assert ours.decode(ids, skip_special=special) == theirs.decode(ids, skip_special_tokens=special), text
    marks = ours.encode("<|im_start|>a<|im_end|>", add_special=False)
    assert (marks[0], marks[-1]) == (92543, 92542)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == (1, (2,), 92544)


@pytest.mark.parametrize(("vectors", "name"), [("llama-spm", "llama2"), ("llama-bpe", "llama3"), ("qwen2", "qwen2_5")])
def test_ids_equal_the_known_vectors(vectors: str, name: str) -> None:
    base = shared(f"data/tokenizers/llamacpp_vectors/ggml-vocab-{vectors}.gguf.inp")
    texts = base.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = base.with_suffix(".out").read_text().split("\n")
    tokenizer = Tokenizer(shared(f"data/tokenizers/{name}"))
    assert len(texts) > 40
    for text, line in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, add_special=False) == [int(number) for number in line.split()], text


def test_a_sentencepiece_file_alone_gives_the_same_ids(tmp_path: Path) -> None:
    source = shared("data/tokenizers/llama2")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    alone, full = Tokenizer(tmp_path), Tokenizer(source)
    for text in TEXTS:
        ids = full.encode(text)
        assert alone.encode(text) == ids, text
        assert alone.decode(ids) == full.decode(ids)
    assert (alone.bos_token_id, alone.eos_token_ids, alone.vocab_size) == (1, (2,), 32000)


def test_a_sentencepiece_model_that_puts_no_space_before_the_text(tmp_path: Path) -> None:
    """Baichuan2's is one: a space that the model writes first is then its own, and stays."""
    for prefix in (True, False):
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat"] * 20),
            model_writer=written,
            model_type="char",
            vocab_size=24,
            add_dummy_prefix=prefix,
            hard_vocab_limit=False,
            user_defined_symbols=["<reserved_106>"],
            minloglevel=2,
        )
        (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
        tokenizer = Tokenizer(tmp_path)
        assert tokenizer.decode(tokenizer.encode("cat", add_special=False)) == "cat"
        spaced = [tokenizer.token_id(piece) for piece in ("\u2581", "c", "a", "t")]
        assert tokenizer.decode(spaced) == ("cat" if prefix else " cat")
        assert tokenizer.token_id("<reserved_106>") in tokenizer.encode("<reserved_106>cat", add_special=False)
        assert tokenizer.chat_template is None
        assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}  # the model's own


def test_a_template_given_takes_the_place_of_the_folders_own(folder: Path) -> None:
    tokenizer = Tokenizer(folder, chat_template="{{ eos_token }}", end_ids=(9, 1))
    assert tokenizer.chat([]) == "</s>"
    assert tokenizer.eos_token_ids == (1, 9)


@pytest.mark.parametrize("name", ["models/stories260K-llama", "models/minimind2-small-llama"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_join_to_the_whole(name: str, data: st.DataObject) -> None:
    check_any_split(loaded(shared(f"data/{name}")), data)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_of_byte_tokens_join_to_the_whole(folder: Path, data: st.DataObject) -> None:
    check_any_split(loaded(folder), data)


@cache
def loaded(path: Path) -> Tokenizer:
    return Tokenizer(path)


def check_any_split(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    decoder = IncrementalDecoder(tokenizer)
    pieces, rest = [], ids
    while rest:
        count = data.draw(st.integers(0, len(rest)))
        pieces.append(decoder.push(rest[:count]) if count else decoder.push_token(rest[0]))
        rest = rest[count or 1 :]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_an_unfinished_character_is_held_back(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    byte_ids = {byte: backend.token_to_id(character) for character, byte in byte_level_alphabet().items()}
    for text in ("a😀b", "汉字", "é"):
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.push_token(byte_ids[byte]) for byte in text.encode()]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert decoder.flush() == ""
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push([byte_ids[0xE6], byte_ids[0xB1]]) == ""
    assert decoder.push_token(byte_ids[0x61]) == "\ufffda", "what is held back comes before a whole character"
    assert decoder.push([byte_ids[0xE6], byte_ids[0xB1]]) == ""
    assert decoder.flush() == "\ufffd"


def test_a_continuation_keeps_the_space_of_its_first_word() -> None:
    tokenizer = Tokenizer(shared("data/models/stories15M-llama"))
    prompt, answer = tokenizer.encode("there was a girl named"), tokenizer.encode("Lily", add_special=False)
    assert IncrementalDecoder(tokenizer, prompt_ids=prompt).push(answer) == " Lily"
    assert IncrementalDecoder(tokenizer, prompt_ids=prompt[:1]).push(answer) == "Lily"  # after BOS a text begins
    assert tokenizer.decode(prompt + answer) == "there was a girl named Lily"


def test_a_long_answer_costs_no_more_per_token(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("the cat sat on the mat 你好 😀 ", add_special=False) * 2000
    decoder = IncrementalDecoder(tokenizer)
    start = time.process_time()
    for token_id in ids:
        decoder.push([token_id])
    assert time.process_time() - start < 20e-6 * len(ids)  # about 1 µs a token; a window over all would take minutes


def test_lengths_baked_into_the_file_do_not_cut(folder: Path) -> None:
    assert len(Tokenizer(folder).encode("the cat sat on the mat " * 5)) > 4


def test_end_ids_join_generation_config_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    assert Tokenizer(tmp_path).eos_token_ids == (1,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer(tmp_path).eos_token_ids == (7, 1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 1]}')
    assert Tokenizer(tmp_path).eos_token_ids == (9, 1)


def test_tokens_that_only_the_settings_name(folder: Path, tmp_path: Path) -> None:
    size = Tokenizer(folder).vocab_size
    extra = {str(size): {"content": "<|tool|>", "special": True}, "0": {"content": "<s>", "special": True}}
    tokenizer = Tokenizer(copied(folder, tmp_path, added_tokens_decoder=extra))
    assert tokenizer.encode("<|tool|>", add_special=False) == [size]
    assert tokenizer.decode([size]) == ""
    with pytest.raises(ValueError, match=r"says that '<\|tool\|>' has id 9000"):
        Tokenizer(copied(folder, tmp_path, added_tokens_decoder={"9000": extra[str(size)]}))


def test_chat_template_sources(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert Tokenizer(copied(folder, tmp_path, chat_template=named)).chat([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("{% generation %}from the file{% endgeneration %}")
    assert Tokenizer(tmp_path).chat([]) == "from the file"
    with pytest.raises(ValueError, match=r"\['tool_use'\], no 'default'"):
        (tmp_path / "chat_template.jinja").unlink()
        Tokenizer(copied(folder, tmp_path, chat_template=named[:1]))


def test_the_template_writes_the_only_bos(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode_chat([{"role": "user", "content": "the cat"}]).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for %}", "not valid"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ().__class__.__bases__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{{ messages[3].content + 1 }}", "does not accept these messages"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_request(
    folder: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    tokenizer = Tokenizer(copied(folder, tmp_path, chat_template=template))
    with pytest.raises(ValueError, match=message):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_folders_that_hold_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        Tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(content | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}})
    )
    with pytest.raises(ValueError, match="BPEDecoder"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["a\ud800", b"a\xe6\xb1".decode(errors="surrogateescape"), "\ude00\ud83d"])
def test_text_that_is_not_unicode(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"not valid Unicode: surrogates not allowed at character [01]"):
        Tokenizer(folder).encode(text)
