import asyncio
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.runtime.client import EngineClient
from engine.runtime.event import Event, TokenLogprob
from engine.runtime.stream import MOST_WAITING, Stream


def event(reason=None, tokens=1):
    return Event(
        request_id="a",
        token_ids=(7,),
        text="x",
        finish_reason=reason,
        prompt_tokens=3,
        cached_tokens=2,
        completion_tokens=tokens,
    )


async def taken(stream):
    return [each async for each in stream]


def test_it_ends_with_the_event_that_ends_the_request():
    async def run():
        aborted = []
        stream = Stream(aborted.append, "a")
        stream.put(event())
        assert (await anext(stream)).finish_reason is None
        for each in (event("stop"), event()):
            stream.put(each)
        assert [each.finish_reason for each in await taken(stream)] == ["stop"]
        assert await taken(stream) == []
        assert aborted == []

    asyncio.run(run())


def test_a_cut_says_how_far_it_came_and_aborts():
    async def run():
        aborted = []
        stream = Stream(aborted.append, "a")
        stream.cut(event(tokens=5))
        [last] = await taken(stream)
        assert (last.finish_reason, last.completion_tokens, last.token_ids) == ("abort", 5, ())
        assert aborted == ["a"]

    asyncio.run(run())


def test_a_failure_is_raised_once_and_close_aborts():
    async def run():
        aborted = []
        stream = Stream(aborted.append, "a")
        stream.fail(RuntimeError("gone"))
        with pytest.raises(RuntimeError, match="gone"):
            await taken(stream)
        assert await taken(stream) == []
        stream.close()
        assert aborted == ["a", "a"]

    asyncio.run(run())


def test_what_a_slow_reader_missed_comes_as_one_event_and_none_is_lost():
    stream = Stream(lambda _: None, "a")
    waiting = []
    for number in range(1000):
        stream.put(event(tokens=number + 1)._replace(token_ids=(number,), text=f"{number} "))
        waiting.append(len(stream._waiting))
    assert max(waiting) <= MOST_WAITING, "what waits for a reader is bounded"
    [whole] = stream.take()
    assert whole.token_ids == tuple(range(1000))
    assert whole.text == "".join(f"{number} " for number in range(1000))
    assert (whole.completion_tokens, whole.finish_reason) == (1000, None)
    assert stream.take() == []


def test_events_with_log_probabilities_stay_apart():
    stream = Stream(lambda _: None, "a")
    scored = event()._replace(logprobs=(TokenLogprob(token_id=7, logprob=-1.0),))
    for each in (event(), event(), scored, scored, event("stop")):
        stream.put(each)
    assert [len(each.token_ids) for each in stream.take()] == [2, 1, 1, 1]


def test_what_came_before_a_failure_is_read_first():
    async def run():
        stream = Stream(lambda _: None, "a")
        stream.put(event())
        stream.fail(RuntimeError("gone"))
        assert len(stream.take()) == 1
        with pytest.raises(RuntimeError, match="gone"):
            stream.take()

    asyncio.run(run())


def test_who_reads_several_streams_is_told_once_a_message():
    client = EngineClient(Path("unused"), EngineConfig())
    streams = [Stream(lambda _: None, name) for name in "abc"]
    client._streams.update({stream.request_id: stream for stream in streams})
    seen = []

    def tell():
        seen.append([len(stream._waiting) for stream in streams])

    for stream in streams[:2]:
        stream.on_arrival = tell
    client._take({"type": "events", "events": tuple(tuple(event()._replace(request_id=name)) for name in "abca")})
    assert seen == [[2, 1, 1]], "when all of the message is there"
    assert streams[2]._arrived.is_set()
