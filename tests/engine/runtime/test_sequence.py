import pytest

from engine.config import Sampling
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
        ("stop", ("", "x")),
    ],
)
def test_an_option_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        check_sampling(Sampling(**{field: value}))


def test_the_ends_of_the_ranges_are_allowed():
    check_sampling(Sampling())
    check_sampling(Sampling(max_new_tokens=1, temperature=0, top_k=1, top_p=0, repetition_penalty=0.5, stop=("x",)))
