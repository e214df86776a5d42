import random

import pytest

from engine.runtime.answer import Answer
from engine.runtime.tokenizer import IncrementalDecoder
from tests.engine.runtime.tiny_model import ALPHABET, CharTokenizer


def run(text, stop):
    """The pieces that `text` comes out as, one character a token, and the answer."""
    answer = Answer(IncrementalDecoder(CharTokenizer()), stop=stop)
    pieces = []
    for character in text:
        pieces.append(answer.push(ALPHABET.index(character)))
        if answer.stopped:
            break
    pieces.append(answer.finish())
    return pieces, answer


def test_without_stop_strings_text_comes_at_once():
    pieces, answer = run("abc", ())
    assert pieces == ["a", "b", "c", ""]
    assert not answer.stopped


def test_what_may_become_a_stop_string_is_held_back_and_then_cut():
    pieces, answer = run("one STOP two", ("STOP",))
    assert pieces == ["o", "n", "e", " ", "", "", "", "", ""]
    assert answer.stopped


def test_what_does_not_become_one_is_given_after_all():
    pieces, answer = run("STOO", ("STOP",))
    assert pieces == ["", "", "", "STOO", ""]
    assert not answer.stopped


def test_the_rest_comes_when_no_token_follows():
    pieces, answer = run("aST", ("STOP",))
    assert pieces == ["a", "", "", "ST"]
    assert not answer.stopped


def test_the_earliest_of_several_stop_strings_cuts():
    for text, stop, expected in (
        ("xabcd", ("abcd", "bc"), "xa"),
        ("aab", ("ab",), "a"),
        ("aaab", ("aab", "b"), "a"),
        ("abab.", ("abac",), "abab."),
        ("x", ("x",), ""),
    ):
        assert "".join(run(text, stop)[0]) == expected, (text, stop)


def test_a_stop_string_across_pieces_of_many_characters():
    answer = Answer(IncrementalDecoder(CharTokenizer()), stop=("cd",))
    assert answer._advance("abc") == "ab"
    assert answer._advance("d efg") == ""
    assert answer.stopped
    assert answer._advance("more") + answer.finish() == ""


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_are_cut_where_the_whole_text_says(seed):
    rng = random.Random(seed)
    for _ in range(200):
        stop = tuple("".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        text = "".join(rng.choices("abc", k=12))
        pieces, answer = run(text, stop)
        # Generation ends with the first token that completes any stop string, and the text before that string stays.
        ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
        whole = text[: ends[0]] if ends else text
        expected = whole[: min(whole.find(s) for s in stop if s in whole)] if ends else text
        assert "".join(pieces) == expected, (text, stop)
        assert answer.stopped == bool(ends)
