import pytest
from tokenizers import decoders, pre_tokenizers

from engine.runtime.token_bytes import byte_level_alphabet, piece_rule, sentencepiece

LLAMA = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def test_the_byte_level_alphabet_is_the_librarys_and_has_every_byte_once():
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    back = {byte: character for character, byte in alphabet.items()}
    text = "naïve 你好\n"
    assert decoders.ByteLevel().decode(["".join(back[byte] for byte in text.encode())]) == text


def test_a_byte_level_piece_is_its_bytes_and_an_added_token_its_text():
    rule = piece_rule({"type": "ByteLevel"}, source="x")
    assert (rule.to_bytes("\u0120the"), rule.to_bytes("\u00e6"), rule.strip) == (b" the", b"\xe6", 0)
    assert rule.to_bytes("<|你|>") == "<|你|>".encode()


def test_a_sentencepiece_piece_is_a_byte_only_with_byte_fallback():
    rule = piece_rule({"type": "Sequence", "decoders": LLAMA}, source="x")
    assert [rule.to_bytes(piece) for piece in ("\u2581the", "<0x0A>", "<0x0a>", "<0xGG>", "a<0x0A>")] == [
        *(b" the", b"\n", b"\n", b"<0xGG>", b"a<0x0A>")
    ]
    assert rule.strip == 1
    assert sentencepiece([], byte_fallback=False, strip=0).to_bytes("<0x0A>") == b"<0x0A>"


@pytest.mark.parametrize(
    ("options", "strip"), [({}, 1), ({"prepend_scheme": "never"}, 0), ({"add_prefix_space": False}, 0)]
)
def test_metaspace_strips_the_space_that_it_put_there(options, strip):
    rule = piece_rule({"type": "Metaspace", "replacement": "_", **options}, source="x")
    assert (rule.to_bytes("_a_"), rule.strip) == (b" a ", strip)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##"},
        {"type": "Sequence", "decoders": LLAMA[:2]},
        {"type": "Sequence", "decoders": [*LLAMA[1:3], LLAMA[0]]},
        {"type": "Sequence", "decoders": [LLAMA[3], *LLAMA[:3]]},
        {"type": "Sequence", "decoders": [LLAMA[0] | {"pattern": {"Regex": "a"}}, LLAMA[2]]},
    ],
)
def test_a_decoder_that_no_rule_expresses_is_refused_naming_the_file(decoder):
    with pytest.raises(ValueError, match=r"^x/tokenizer\.json: cannot read the token decoder"):
        piece_rule(decoder, source="x/tokenizer.json")
