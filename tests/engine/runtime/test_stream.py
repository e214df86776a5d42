import asyncio

import pytest

from engine.runtime.event import Event
from engine.runtime.stream import Stream


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
        for each in (event(), event("stop"), event()):
            stream.put(each)
        assert [each.finish_reason for each in await taken(stream)] == [None, "stop"]
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
