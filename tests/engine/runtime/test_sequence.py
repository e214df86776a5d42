import pytest

from engine.config import Grammar, Sampling
from engine.runtime.sequence import Sequence, check_sampling


def test_three_numbers_say_where_a_sequence_stands():
    sequence = Sequence(request_id="a", tokens=[5, 6, 7, 8], limit=6)
    assert (len(sequence), sequence.prompt_length, sequence.draws) == (4, 4, False)
    sequence.scheduled = 3
    assert sequence.scheduled_tokens == [5, 6, 7]
    assert not sequence.draws
    sequence.cached, sequence.scheduled = 3, 1
    assert sequence.scheduled_tokens == [8]
    assert sequence.draws
    sequence.tokens += [9, 10]
    sequence.cached, sequence.scheduled = 5, 1
    assert not sequence.draws, "there is no room for a seventh token"
    assert sequence.prompt_length == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", 100.1),
        ("stop", ("", "x")),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("-inf")),
        ("logit_bias", ((10, 0.0),)),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((3, 101.0),)),
        ("logit_bias", ((3, float("nan")),)),
        ("stop_token_ids", (3, 10)),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_an_option_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} (is|has) "):
        check_sampling(Sampling(**{field: value}), vocab_size=10)


def test_a_grammar_says_where_an_answer_ends():
    with pytest.raises(ValueError, match="ignore_eos"):
        check_sampling(Sampling(ignore_eos=True, grammar=Grammar(kind="json")), vocab_size=10)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, False),
        ({"logit_bias": ((1, 2.0),), "logprobs": 2, "stop_token_ids": (1,), "min_p": 0.1, "ignore_eos": True}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
    ],
)
def test_what_depends_on_the_tokens_before_needs_the_host(options, needs):
    assert Sequence(request_id="a", tokens=[1], limit=9, sampling=Sampling(**options)).needs_host is needs


def test_the_ends_of_the_ranges_are_allowed():
    check_sampling(Sampling(), vocab_size=10)
    least = {"max_new_tokens": 1, "temperature": 0, "top_k": 1, "top_p": 0, "repetition_penalty": 0.5, "stop": ("x",)}
    edges = {"min_p": 1, "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": ((9, -100), (0, 100))}
    check_sampling(Sampling(**least, **edges, stop_token_ids=(0, 9), logprobs=20), vocab_size=10)
