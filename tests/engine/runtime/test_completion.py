import pytest

from engine.runtime.completion import completion_of
from engine.runtime.event import Event


def event(tokens, text, reason=None):
    return Event(
        request_id="a",
        token_ids=tokens,
        text=text,
        finish_reason=reason,
        prompt_tokens=3,
        cached_tokens=2,
        completion_tokens=len(tokens),
    )


def test_an_answer_is_its_events_in_order():
    answer = completion_of([event((5,), "a"), event((), ""), event((6, 7), "bc", "stop")])
    assert (answer.token_ids, answer.text, answer.finish_reason) == ((5, 6, 7), "abc", "stop")
    assert (answer.prompt_tokens, answer.cached_tokens, answer.logprobs) == (3, 2, ())


def test_an_answer_that_has_not_ended_is_none():
    with pytest.raises(AssertionError):
        completion_of([event((5,), "a")])
