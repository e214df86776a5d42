import base64
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.runtime.rank_file import LLAMA3, QWEN, is_rank_file
from engine.runtime.token_bytes import byte_level_alphabet
from engine.runtime.tokenizer import IncrementalDecoder, Tokenizer
from tests.shared_data import shared

TEXTS = [
    "Once upon a time, there's a girl who'll 12345 TIMES",
    "  two spaces, a tab\tand\r\n\n lines \n",
    "你好，世界！今天天气不错。",
    "def f(x):\n\treturn x ** 2  # 平方\n",
    "😀👩‍👩‍👧 naïve ﷽ \u0000",
    "broken \ufffd\ufffd bytes",
    "",
]
WORDS = ["the cat sat on the mat, there's 1234 of them\n", "def f(x):\n    return x ** 2\n", "你好，世界 😀"] * 4


def rank_lines(tokens: dict[str, int]) -> str:
    """A byte-level vocabulary as a rank file holds it: by id, without special tokens."""
    table = {ord(character): byte for character, byte in byte_level_alphabet().items()}
    rows = sorted((rank, piece.translate(table).encode("latin-1")) for piece, rank in tokens.items())
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in rows)


def trained(digits: int) -> tokenizers.Tokenizer:
    """A BPE with Qwen's or Llama 3's split, trained on a few words; its merges are in the order of its ids."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


@pytest.fixture(params=[("qwen.tiktoken", QWEN), ("tokenizer.model", LLAMA3)], ids=["qwen", "llama3"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """The tokenizer of a small rank file, and the one that the ranks were taken from, with the special tokens added."""
    name, model = request.param
    reference = trained(model.digits)
    (tmp_path / name).write_text(rank_lines(reference.get_vocab()))
    reference.add_special_tokens(list(model.special))
    return Tokenizer(tmp_path), reference


def test_ids_and_texts_equal_those_of_the_tokenizer_that_the_ranks_are_from(case) -> None:
    ours, reference = case
    assert ours.vocab_size == reference.get_vocab_size()
    assert ours.bos_token_id in (None, reference.token_to_id("<|begin_of_text|>"))
    for text in [*TEXTS, *WORDS, "a<|im_end|>b<|eot_id|>c<|endoftext|>"]:
        ids = reference.encode(text).ids
        assert ours.encode(text, add_special=False) == ids, text
        assert ours.encode(text) == ([] if ours.bos_token_id is None else [ours.bos_token_id]) + ids
        assert ours.decode(ids, skip_special=False) == text
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        decoder = IncrementalDecoder(ours, skip_special=False)
        assert "".join(decoder.push([i]) for i in ids) + decoder.flush() == text


def test_qwen_brings_text_into_one_normal_form_and_has_its_special_tokens(tmp_path: Path) -> None:
    vocabulary = trained(1).get_vocab()
    (tmp_path / "qwen.tiktoken").write_text(rank_lines(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    tokenizer, count = Tokenizer(tmp_path), len(vocabulary)
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [count + 1, count + 2]
    assert tokenizer.token_id("<|extra_204|>") == count + 207 == tokenizer.vocab_size - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, (count,))
    assert tokenizer.decode([count + 3]) == ""


def test_llama3_begins_with_its_bos_unless_told_otherwise(tmp_path: Path) -> None:
    vocabulary = trained(3).get_vocab()
    (tmp_path / "tokenizer.model").write_text(rank_lines(vocabulary))
    count = len(vocabulary)
    assert Tokenizer(tmp_path).encode("")[:1] == [count]
    assert Tokenizer(tmp_path).special_tokens["bos_token"] == "<|begin_of_text|>"
    assert [Tokenizer(tmp_path).token_id(f"<|{name}|>") for name in ("start_header_id", "eot_id")] == [
        count + 6,
        count + 9,
    ]
    named = {str(count + 4): {"content": "<|finetune_right_pad_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "added_tokens_decoder": named}))
    changed = Tokenizer(tmp_path)
    assert changed.encode("<|finetune_right_pad_id|>") == [count + 4]
    assert changed.token_id("<|reserved_special_token_2|>") is None
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "<|x|>"}}}')
    with pytest.raises(ValueError, match=r"adds a token with id 3, which tokenizer\.model has given away"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "vectors"),
    [("qwen2_5", "qwen.tiktoken", "qwen2"), ("llama3", "tokenizer.model", "llama-bpe")],
)
def test_the_real_ranks_give_the_ids_of_the_known_vectors(name: str, file: str, vectors: str, tmp_path: Path) -> None:
    """Qwen2.5's vocabulary without its special tokens is Qwen's, and Llama 3's is what Meta's tokenizer.model holds."""
    content = json.loads((shared(f"data/tokenizers/{name}") / "tokenizer.json").read_text(encoding="utf-8"))
    added = {entry["content"] for entry in content["added_tokens"]}
    vocabulary = {piece: i for piece, i in content["model"]["vocab"].items() if piece not in added}
    (tmp_path / file).write_text(rank_lines(vocabulary))
    tokenizer = Tokenizer(tmp_path)
    inputs = shared(f"data/tokenizers/llamacpp_vectors/ggml-vocab-{vectors}.gguf.inp")
    texts = inputs.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = inputs.with_suffix(".out").read_text().split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_special=False) == [int(number) for number in line.split()], text
    known = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_0|>": 151646}
    if name == "llama3":
        known = {token: entry["id"] for entry in content["added_tokens"] if (token := entry["content"])}
    assert {token: tokenizer.token_id(token) for token in known} == known


def test_a_million_spaces_are_text_too(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text(rank_lines(trained(1).get_vocab()))
    ours = Tokenizer(tmp_path)
    text = "a" + " " * 1_000_000 + "b"
    assert ours.decode(ours.encode(text, add_special=False)) == text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines, "!!! 340"], r"line \d+ is not 'base64 rank': '!!! 340'"),
        (lambda lines: [*lines, "YQ=="], r"line \d+ is not 'base64 rank': 'YQ=='"),
        (lambda lines: [*lines, "cXF4eA== ten"], "is not 'base64 rank'"),
        (lambda lines: lines[:100], "no token for the byte"),
        (lambda lines: lines[:-2] + lines[-1:], r"the ranks are not 0 to \d+, each once"),
        (lambda lines: [*lines, "cXF4eA== 5"], "the ranks are not 0 to"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, damage, message: str) -> None:
    lines = rank_lines(trained(1).get_vocab()).splitlines()
    (tmp_path / "qwen.tiktoken").write_text("\n".join(damage(lines)) + "\n")
    with pytest.raises(ValueError, match=rf"qwen\.tiktoken: .*{message}"):
        Tokenizer(tmp_path)


def test_a_rank_file_is_told_from_a_sentencepiece_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    for content, ranks in ((b"IQ== 0\nIg== 1\n", True), (b"\n\x0e\n\x05<unk>\x15", False), (b"", False)):
        file.write_bytes(content)
        assert is_rank_file(file) is ranks


def test_another_tiktoken_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor .*how other\.tiktoken splits text"):
        Tokenizer(tmp_path)
