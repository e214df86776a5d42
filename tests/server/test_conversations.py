import pytest

from server.conversations import Conversations
from server.errors import RequestError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def made(most=3, timeout=10.0):
    clock = Clock()
    return Conversations(timeout=timeout, most=most, clock=clock), clock


def round_of(conversations, owner, number, text, *, renew=False, keep=True):
    found = conversations.begin(owner, number, renew=renew)
    before = [turn["content"] for turn in found.turns]
    found.turns.append({"role": "user", "content": text})
    conversations.finish(owner, number, keep=keep)
    return before


def test_what_was_said_is_kept_for_its_owner_alone():
    conversations, _ = made()
    assert round_of(conversations, "a", 1, "x") == []
    assert round_of(conversations, "a", 1, "y") == ["x"]
    assert round_of(conversations, "b", 1, "z") == []
    assert round_of(conversations, "a", 2, "z") == []
    assert round_of(conversations, "a", 1, "z", renew=True) == []
    assert round_of(conversations, "a", 1, "z", keep=False) == ["z"]
    assert round_of(conversations, "a", 1, "z") == []


def test_a_round_at_a_time():
    conversations, _ = made()
    conversations.begin("a", 1, renew=False)
    with pytest.raises(RequestError, match="Session 1 is answering") as caught:
        conversations.begin("a", 1, renew=True)
    assert caught.value.status == 409
    assert conversations.begin("b", 1, renew=False)


def test_an_idle_one_is_forgotten_after_its_time():
    conversations, clock = made()
    round_of(conversations, "a", 1, "x")
    clock.now += 9
    assert round_of(conversations, "a", 1, "y") == ["x"]
    clock.now += 11
    with pytest.raises(RequestError, match="idle for 10 seconds") as caught:
        conversations.stop("a", 1)
    assert caught.value.status == 404
    assert len(conversations) == 0
    conversations.begin("a", 1, renew=False)
    clock.now += 100
    round_of(conversations, "b", 1, "x")
    assert len(conversations) == 2, "one that answers is not idle"


def test_beyond_the_limit_the_owners_own_oldest_goes():
    conversations, _ = made(most=2)
    round_of(conversations, "b", 1, "x")
    for number in (1, 2, 1, 3):
        round_of(conversations, "a", number, "x")
    assert len(conversations) == 3
    assert round_of(conversations, "a", 1, "y") == ["x", "x"]
    assert round_of(conversations, "b", 1, "y") == ["x"]
    assert round_of(conversations, "a", 2, "y") == [], "it was used before 1 was"


def test_stopping_reaches_the_round_that_runs():
    conversations, _ = made()
    stopped = []
    conversations.begin("a", 1, renew=False).stop = lambda: stopped.append(1)
    conversations.stop("a", 1)
    assert stopped == [1]
    with pytest.raises(RequestError):
        conversations.stop("b", 1)
    conversations.finish("a", 1, keep=True)
    conversations.stop("a", 1)
    assert stopped == [1]
