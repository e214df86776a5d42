"""Grammars over a vocabulary of single characters, whole words and ids without text."""

import json
import random
import re
import sys

import pytest

from engine.config import Grammar
from engine.runtime.grammar import Grammars

pytest.importorskip("xgrammar", reason="xgrammar is not installed")

PIECES = [bytes([byte]) for byte in range(256)] + [b"true", b'{"', b'":', b"", b"</s>", b""]
END, SPECIAL = 259, 261
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 12}, "b": {"enum": ["x", "\u00e9"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


class Pieces:
    def token_bytes(self, token_id, *, skip_special=True):
        if token_id == SPECIAL:
            return b"" if skip_special else b"<|tool|>"
        return PIECES[token_id] if token_id < len(PIECES) else b""


def grammars(vocab_size=300, ends=(END,), **options):
    return Grammars(Pieces(), vocab_size=vocab_size, eos_token_ids=ends, **options)


def tokens_of(mask):
    return [32 * word + bit for word, bits in enumerate(mask) for bit in range(32) if bits >> bit & 1]


def random_answer(constraint, seed):
    """Any answer that the masks allow, drawn evenly."""
    draw, answer = random.Random(seed), []
    while (token := draw.choice(tokens_of(constraint.allowed(answer)))) != END:
        answer.append(token)
        assert len(answer) < 2000
    return b"".join(PIECES[token] for token in answer)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        (Grammar(kind="regex", text="[a-c]{2,5}x?"), lambda text: re.fullmatch("[a-c]{2,5}x?", text)),
        (
            Grammar(kind="ebnf", text='root ::= "a" root "b" | "-"'),
            lambda text: text == "a" * (len(text) // 2) + "-" + "b" * (len(text) // 2),
        ),
        (
            Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
            lambda text: 3 <= json.loads(text)["a"] <= 12 and json.loads(text)["b"] in "x\u00e9",
        ),
    ],
    ids=["regex", "ebnf", "json_schema"],
)
def test_every_answer_that_the_masks_allow_follows_the_grammar(grammar, holds, compiled):
    known = grammars()
    if compiled:
        grammar = grammars().serialized(grammar)
        assert grammar.kind == "compiled"
    for seed in range(30):
        assert holds(random_answer(known.constraint(grammar), seed).decode())


def test_json_is_an_object_on_one_line():
    constraint = grammars().constraint(Grammar(kind="json"))
    assert {PIECES[token] for token in tokens_of(constraint.allowed([]))} == {b"{", b'{"'}
    assert tokens_of(constraint.allowed([*b'{"a": [1, tru'])) == [ord("e")]
    assert tokens_of(constraint.allowed([*b'{"a": [1, true]}'])) == [END]


def test_a_special_token_comes_only_where_a_tag_names_it():
    content = {"type": "regex", "pattern": "[0-9]"}
    tag = {"type": "tag", "begin": {"type": "token", "token": SPECIAL}, "content": content, "end": "!"}
    constraint = grammars().constraint(
        Grammar(kind="structural_tag", text=json.dumps({"type": "structural_tag", "format": tag}))
    )
    assert tokens_of(constraint.allowed([])) == [SPECIAL]
    assert tokens_of(constraint.allowed([SPECIAL])) == [*b"0123456789"]
    string = Grammar(kind="json_schema", text='{"type": "string"}')
    for grammar, begun in ((Grammar(kind="regex", text="(.|\\n)*"), b""), (string, b'"')):
        allowed = tokens_of(grammars().constraint(grammar).allowed([*begun]))
        assert SPECIAL not in allowed
        assert ord("x") in allowed


def test_an_answer_ends_where_the_vocabulary_cannot_go_on():
    letters = Grammars(Letters(), vocab_size=40, eos_token_ids=(31,))
    constraint = letters.constraint(Grammar(kind="regex", text="ab[0-9]"))
    assert tokens_of(constraint.allowed([0])) == [1]
    assert tokens_of(constraint.allowed([0, 1])) == [31]


class Letters:
    def token_bytes(self, token_id, *, skip_special=True):
        return bytes([ord("a") + token_id]) if token_id < 26 else b""


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar(kind="regex", text="(a"), "The regex cannot be followed: .*parenthesis"),
        (Grammar(kind="ebnf", text="root ::= nobody"), "The grammar cannot be followed: .*nobody"),
        (Grammar(kind="json_schema", text="{"), "The schema cannot be followed"),
        (Grammar(kind="structural_tag", text="[]"), "The structural_tag cannot be followed"),
        (Grammar(kind="ebnf", text="root ::= root"), "allows no answer"),
        (Grammar(kind="json_schema", text='{"$ref": "#"}'), "allows no answer"),
        (Grammar(kind="compiled", text="{}"), "The compiled cannot be followed"),
    ],
)
def test_a_grammar_that_is_not_valid_is_refused(grammar, words):
    with pytest.raises(ValueError, match=words) as caught:
        grammars().constraint(grammar)
    assert "/project/" not in str(caught.value)


def test_a_model_without_an_end_token_follows_none():
    with pytest.raises(ValueError, match="end token"):
        grammars(ends=()).constraint(Grammar(kind="json"))


def test_a_grammar_is_compiled_once_and_forgotten_when_too_many_are_known():
    known = grammars()
    first = Grammar(kind="regex", text="a")
    assert known.compiled(first) is known.compiled(Grammar(kind="regex", text="a"))
    small = grammars(most_bytes=1)
    one = small.compiled(first)
    small.compiled(Grammar(kind="regex", text="b"))
    assert small.compiled(first) is not one


def test_without_xgrammar_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match="pip install"):
        grammars().constraint(Grammar(kind="json"))
