import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from engine.runtime.vocabulary import JsonVocabulary, SentencePieceVocabulary, native_errors

DIGITS = {"7": {"content": "<|end|>", "special": True}}


@pytest.fixture
def file(tmp_path):
    """A tokenizer.json of six letters and a placeholder."""
    vocabulary = {piece: i for i, piece in enumerate([*"abcdef", "[UNUSED_1]", "[UNUSED_2]"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def changed(file, **sections):
    file.write_text(json.dumps(json.loads(file.read_text()) | sections))
    return file


def test_a_placeholder_takes_the_name_that_the_settings_give_its_id(file):
    vocabulary = JsonVocabulary(file, {"added_tokens_decoder": DIGITS})
    assert vocabulary.encode("ab<|end|>", True) == [0, 1, 7]
    assert (vocabulary.token_id("[UNUSED_1]"), vocabulary.token_id("[UNUSED_2]")) == (6, None)
    assert (vocabulary.special_ids, vocabulary.size) == ({7}, 8)


def test_an_id_that_is_another_tokens_is_refused(file):
    with pytest.raises(ValueError, match=r"says that '<\|end\|>' has id 3, tokenizer\.json 8"):
        JsonVocabulary(file, {"added_tokens_decoder": {"3": DIGITS["7"]}})


@pytest.mark.parametrize("token_id", [-1, 8, 2**31, 2**32, 2**70])
def test_an_id_outside_has_no_bytes(file, token_id):
    assert JsonVocabulary(file, {}).to_bytes(token_id) == b""


def test_a_pattern_that_searches_without_end_is_an_error_of_the_text(file):
    """The library gives up after ten million steps, with a panic that is no Exception."""
    split = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), behavior="isolated")
    vocabulary = JsonVocabulary(changed(file, pre_tokenizer=json.loads(split.__getstate__())), {})
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode this text: Onig: Regex search error"):
        vocabulary.encode("a" * 40 + "b", True)
    assert vocabulary.encode("ab", True) == [0, 1]


def test_errors_of_native_code_are_ours_and_an_interrupt_is_not():
    class PanicException(BaseException):  # the library's own cannot be imported
        pass

    for error in (PanicException("a\n  b"), Exception("a b"), RuntimeError("a b")):
        with pytest.raises(ValueError, match=r"^x is not whole: a b$"), native_errors("x is not whole"):
            raise error
    with pytest.raises(KeyboardInterrupt), native_errors("x"):
        raise KeyboardInterrupt


@pytest.fixture
def model(tmp_path):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_writer=written,
        model_type="char",
        vocab_size=24,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    return tmp_path / "tokenizer.model"


def test_a_sentencepiece_model_with_tokens_of_the_settings(model):
    plain = SentencePieceVocabulary(model, {})
    added = {str(plain.size + 2): {"content": "<|end|>", "special": True}}
    vocabulary = SentencePieceVocabulary(model, {"added_tokens_decoder": added, "add_eos_token": True})
    assert vocabulary.size == plain.size + 3
    assert vocabulary.encode("<|end|>", True) == [1, plain.size + 2, 2]
    assert vocabulary.to_bytes(plain.size) == b"" and vocabulary.to_bytes(plain.size + 2) == b"<|end|>"


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_sentencepiece_model_is_refused_naming_the_file(model, content):
    model.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        SentencePieceVocabulary(model, {})
