"""Log-probabilities, through the official client and by themselves."""

import math

import openai
import pytest

from engine.runtime.event import Event, TokenLogprob
from server.logprobs import LogprobQueue, completion_logprobs
from tests.server.running import Served

HELLO = [{"role": "user", "content": "the cat sat"}]
ENDLESS = {"ignore_eos": True}


def test_chat_shows_each_token_and_the_likeliest(api: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    whole = api.chat.completions.create(**asked, temperature=0, extra_body=ENDLESS).choices[0]
    entries = whole.logprobs.content
    assert len(entries) == 12
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == whole.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        ranked = [top.logprob for top in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert entry.logprob == ranked[0], "greedy takes the likeliest"
        assert sum(math.exp(value) for value in ranked) <= 1
    streamed = []
    for chunk in api.chat.completions.create(**asked, temperature=0, stream=True, extra_body=ENDLESS):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert streamed == entries


def test_they_are_the_models_own_whatever_is_sampled(api: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    plain = api.chat.completions.create(**asked, temperature=0, extra_body=ENDLESS).choices[0].logprobs.content[0]
    bent = api.chat.completions.create(
        **asked, temperature=0.3, seed=1, top_p=0.1, logit_bias={"70": 50}, presence_penalty=1, extra_body=ENDLESS
    )
    assert bent.choices[0].logprobs.content[0].top_logprobs == plain.top_logprobs


def test_without_being_asked_for_there_are_none(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, logprobs=False)
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize("count", [0, 1, 5])
def test_completions_have_them_in_their_own_shape(api: openai.OpenAI, count: int) -> None:
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 9, "logprobs": count, "seed": 5}
    choice = api.completions.create(**asked, extra_body=ENDLESS).choices[0]
    found = choice.logprobs
    assert [len(each) for each in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)] == [
        9
    ] * 4
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert count <= len(top) <= count + 1
        if token in top:
            assert top[token] == logprob
    streamed: dict[str, list[object]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in api.completions.create(**asked, stream=True, extra_body=ENDLESS):
        for each in chunk.choices:
            for name, values in streamed.items():
                values += getattr(each.logprobs, name) if each.logprobs else []
    assert streamed["tokens"] == found.tokens
    assert streamed["token_logprobs"] == found.token_logprobs
    assert streamed["text_offset"][:3] == found.text_offset[:3]


def test_the_tokens_of_a_stop_string_are_not_shown(api: openai.OpenAI, served: Served) -> None:
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 30, "temperature": 0, "logprobs": 0}
    text = api.completions.create(**asked, extra_body=ENDLESS).choices[0].text
    stop = text[10:13]
    choice = api.completions.create(**asked, stop=stop, extra_body=ENDLESS).choices[0]
    shown = choice.logprobs.tokens
    assert len(shown) < 30
    assert "".join(shown).startswith(choice.text)
    assert "".join(shown[:-1]) in choice.text or not shown[:-1]


class Letters:
    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return [b"a", b"bc", "é".encode()[:1], "é".encode()[1:], b""][token_id]


def event(text: str, *tokens: int, reason: str | None = None) -> Event:
    logprobs = tuple(TokenLogprob(token_id=token, logprob=-1.0 - token) for token in tokens)
    return Event(
        request_id="x",
        token_ids=tokens,
        text=text,
        finish_reason=reason,  # type: ignore[arg-type]
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
        logprobs=logprobs,
    )


def test_entries_wait_for_their_text() -> None:
    queue = LogprobQueue(Letters(), skip_special=True)
    ids = [
        [entry.token_id for entry in queue.take(each)]
        for each in (
            event("a", 0),
            event("", 2),
            event("é", 3),
            event("", 1),
            event("bca", 0),
            event("", 4, reason="stop"),
        )
    ]
    assert ids == [[0], [], [2, 3], [], [1, 0], []]


def test_what_is_left_of_an_answer_that_was_cut_is_shown() -> None:
    queue = LogprobQueue(Letters(), skip_special=True)
    assert [entry.token_id for entry in queue.take(event("\ufffd", 2, reason="length"))] == [2]


def test_pieces_of_characters_have_names_of_their_own() -> None:
    entry = TokenLogprob(token_id=2, logprob=-1.0, top=((2, -1.0), (3, -2.0)))
    assert completion_logprobs([entry], Letters(), offset=4) == {
        "tokens": ["\ufffd"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}],
        "text_offset": [4],
    }
