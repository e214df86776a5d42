"""Damaged tokenizer files end in an error that names the file: no crash, no hang, no memory beyond their own size.

The libraries that read them are native code, so every case runs in a process whose death is a failure.
"""

import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.confined import Confined, DamagedFolder
from tests.damage import ODD_NUMBERS, ODD_TEXTS, Damage, damaged_bytes, damaged_json, encode, hold
from tests.engine.runtime import wire_format
from tests.engine.runtime.test_rank_file import rank_lines, trained

FEW, MANY = 60, 2000
DOOR = "tests.engine.runtime.doors:tokenizer"
WORDS = ["the cat sat on the mat, there's 1234 of them\n", "def f(x):\n    return x ** 2\n", "你好，世界 😀"] * 4
ODD_INTEGERS = [number for number in ODD_NUMBERS if isinstance(number, int) and -(2**63) <= number < 2**64]
Format = Callable[[], tuple[dict[str, bytes], Damage]]


@pytest.fixture(scope="module")
def confined() -> Iterator[Confined]:
    process = Confined()
    yield process
    process.close()


def settings_of(**changes: Any) -> dict[str, Any]:
    return {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False, "special": True},
        "add_bos_token": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        **changes,
    }


@cache
def byte_level() -> dict[str, Any]:
    backend = tokenizers.Tokenizer(models.BPE(unk_token=None))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\u00a0", " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"'s|\p{N}{1,3}|\s+(?!\S)|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(512)
    backend.enable_padding()
    return json.loads(backend.to_str())


@cache
def sentencepiece_like() -> dict[str, Any]:
    """A tokenizer.json as it is made of Llama 2's tokenizer.model."""
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    for piece in ["\u2581", *"thecaon", "th", "he", "\u2581the"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("t", "h"), ("h", "e"), ("\u2581", "the")][:2]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(backend.to_str())


@cache
def unigram() -> dict[str, Any]:
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -2.0) for piece in "\u2581thecatsonm")]
    backend = tokenizers.Tokenizer(models.Unigram([*vocabulary, ("the", -1.0)], unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return json.loads(backend.to_str())


@cache
def sentencepiece_model(kind: str) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 5),
        model_writer=written,
        model_type=kind,
        vocab_size=60 + 256,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["<reserved_1>"],
    )
    return written.getvalue()


def tokenizer_json_damage() -> tuple[dict[str, bytes], Damage]:
    files = {"tokenizer.json": encode(byte_level()), "tokenizer_config.json": encode(settings_of())}
    contents = st.sampled_from([byte_level, sentencepiece_like, unigram])
    return files, contents.flatmap(lambda made: damaged_json(made())).map(lambda file: {"tokenizer.json": file})


def settings_damage() -> tuple[dict[str, bytes], Damage]:
    """tokenizer_config.json and its neighbours, beside each kind of vocabulary."""
    size = len(byte_level()["model"]["vocab"])
    added = {str(size): {"content": "<|im_start|>", "special": True}, "0": {"content": "<s>", "special": True}}
    settings = settings_of(added_tokens_decoder=added, legacy=False)
    generation = {"eos_token_id": [1, 2], "pad_token_id": None}
    named = {"eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    files = {
        "tokenizer.json": encode(byte_level()),
        "tokenizer_config.json": encode(settings),
        "generation_config.json": encode(generation),
        "config.json": encode({"eos_token_id": 1}),
        "special_tokens_map.json": encode(named),
    }
    alone = st.sampled_from(
        [
            {"tokenizer.json": None, "tokenizer.model": sentencepiece_model("unigram")},
            {"tokenizer.json": None, "qwen.tiktoken": rank_lines(trained(1).get_vocab()).encode()},
            {"tokenizer.json": None, "tokenizer.model": rank_lines(trained(3).get_vocab()).encode()},
            *[{}] * 3,
        ]
    )
    changed = st.one_of(
        *[damaged_json(settings).map(lambda file: {"tokenizer_config.json": file})] * 3,
        damaged_json(generation).map(lambda file: {"generation_config.json": file}),
        damaged_json(named).map(lambda file: {"special_tokens_map.json": file}),
        damaged_json({"eos_token_id": 1}).map(lambda file: {"config.json": file, "generation_config.json": None}),
        damaged_bytes(b"{{ messages }}").map(lambda file: {"chat_template.jinja": file}),
    )
    return files, st.builds(lambda one, other: one | other, alone, changed)


@st.composite
def changed_message(draw: st.DrawFn, valid: bytes) -> bytes:
    """A SentencePiece model that is still a protobuf: pieces, specifications and their fields changed."""
    fields = wire_format.split(valid)
    for _ in range(draw(st.integers(1, 3))):
        numbers = sorted({number for number, *_ in fields})
        wanted = draw(st.sampled_from(numbers))  # 1 is a piece, 2 and 3 are how the model was made and how text is
        index = draw(st.sampled_from([i for i, (number, *_) in enumerate(fields) if number == wanted]))
        match draw(st.sampled_from(["inside"] * 6 + ["remove", "double", "first"])):
            case "inside":
                inner = wire_format.split(bytes(fields[index][2]))
                if inner:
                    place = draw(st.integers(0, len(inner) - 1))
                    inner[place] = draw(changed_field(inner[place]))
                if draw(st.integers(0, 3)) == 0:
                    inner.append((draw(st.integers(1, 50)), 0, draw(st.sampled_from(ODD_INTEGERS))))
                fields[index] = (wanted, 2, wire_format.join(inner))
            case "remove" if len(fields) > 1:
                del fields[index : index + draw(st.sampled_from([1, 2, 500]))]
                fields = fields or [(1, 2, b"")]
            case "double":
                fields.append(fields[index])
            case "first":
                fields.insert(0, fields.pop(index))
    return wire_format.join(fields)


@st.composite
def changed_field(draw: st.DrawFn, field: wire_format.Field) -> wire_format.Field:
    number, kind, value = field
    if isinstance(value, int):
        return number, kind, draw(st.integers(0, 6) | st.sampled_from(ODD_INTEGERS))
    if kind == 5:
        odd = [0.0, -1.0, -1e38, 3e38, float("nan"), float("inf"), float("-inf")]
        return number, kind, wire_format.float32(draw(st.sampled_from(odd)))
    texts = st.sampled_from(ODD_TEXTS).map(lambda text: text.encode(errors="surrogatepass"))
    return number, kind, draw(st.one_of(texts, damaged_bytes(value), st.binary(max_size=64), st.just(value * 2)))


def sentencepiece_damage() -> tuple[dict[str, bytes], Damage]:
    kinds = st.sampled_from(["unigram", "bpe", "char"])
    damaged = kinds.map(sentencepiece_model).flatmap(
        lambda valid: st.one_of(changed_message(valid), changed_message(valid), damaged_bytes(valid))
    )
    files = {"tokenizer.model": sentencepiece_model("unigram"), "tokenizer_config.json": encode(settings_of())}
    return files, damaged.map(lambda file: {"tokenizer.model": file})


@st.composite
def changed_ranks(draw: st.DrawFn, valid: bytes) -> bytes:
    lines = valid.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(lines) - 1))
        token, _, rank = lines[index].partition(b" ")
        odd = [str(number).encode() for number in ODD_NUMBERS] + [
            text.encode(errors="surrogatepass") for text in ODD_TEXTS
        ]
        match draw(st.sampled_from(["token", "rank", "remove", "double", "swap", "shift"])):
            case "token":
                lines[index] = draw(st.sampled_from(odd)) + b" " + rank
            case "rank":
                lines[index] = token + b" " + draw(st.sampled_from(odd))
            case "remove" if len(lines) > 1:
                del lines[index]
            case "double":
                lines.append(lines[index])
            case "swap":
                lines[index], lines[0] = lines[0], lines[index]
            case "shift":
                lines.append(draw(st.sampled_from(odd)) + b" %d" % len(lines))
    return b"\n".join(lines) + draw(st.sampled_from([b"\n", b"", b"\n\n\n"]))


def rank_damage(name: str, digits: int) -> Format:
    def made() -> tuple[dict[str, bytes], Damage]:
        valid = rank_lines(trained(digits).get_vocab()).encode()
        files = {name: valid, "tokenizer_config.json": encode(settings_of())}
        return files, st.one_of(changed_ranks(valid), damaged_bytes(valid)).map(lambda file: {name: file})

    return made


FORMATS: dict[str, Format] = {
    "tokenizer.json": tokenizer_json_damage,
    "settings": settings_damage,
    "sentencepiece": sentencepiece_damage,
    "qwen.tiktoken": rank_damage("qwen.tiktoken", 1),
    "llama3 ranks": rank_damage("tokenizer.model", 3),
}


def look(confined: Confined, name: str, *, count: int, random: bool) -> dict[str, int]:
    files, damage = FORMATS[name]()
    folder = DamagedFolder(confined, DOOR, files)
    try:
        return hold(folder, damage, count=count, random=random)
    finally:
        folder.close()


@pytest.mark.parametrize("name", FORMATS)
def test_damage_ends_in_an_error_that_names_the_file(confined: Confined, name: str) -> None:
    assert look(confined, name, count=FEW, random=False)["refused"] > FEW // 6


@pytest.mark.soak
@pytest.mark.parametrize("name", FORMATS)
def test_damage_soak(confined: Confined, name: str, soak_row: dict[str, int]) -> None:
    soak_row["failures"] = 1
    outcomes = look(confined, name, count=MANY, random=True)
    soak_row |= {"count": sum(outcomes.values()), "failures": 0}
