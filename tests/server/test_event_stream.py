"""Streams of lines: written at once where that can be, else waited for, in their order, and closed whatever happens."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.types import Message

from server.connection import WRITE
from server.event_stream import EventStream


class News:
    """What `Answers` says to a stream: texts that come one by one from outside."""

    def __init__(self, count: int) -> None:
        self.waiting: list[str] = []
        self.left = count
        self.on_news: Callable[[], None] = lambda: None

    @property
    def over(self) -> bool:
        return not self.left

    def follow(self, on_news: Callable[[], None]) -> None:
        self.on_news = on_news

    def put(self, text: str) -> None:
        self.waiting.append(text)
        self.on_news()

    def lines(self) -> Iterator[str]:
        while self.left:
            taken, self.waiting = self.waiting, []
            self.left -= len(taken)
            if "broken" in taken:
                raise RuntimeError("broken")
            yield "".join(taken)
        yield "end"


TEXTS = [f"{number} " for number in range(20)]


async def streamed(
    texts: list[str], write: Callable[[bytes], bool] | None, *, seconds: float, leave_after: int | None = None
) -> tuple[list[str], list[str], bool]:
    """What was sent by `send`, which takes `seconds`, and by `write`, in one order; by `send` alone; whether the end
    was sent. AssertionError where the stream was not closed."""
    news = News(len(texts))
    closed: list[bool] = []
    sent: list[str] = []
    slow: list[str] = []
    ended: list[bool] = []
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(seconds)
        if message["type"] == "http.response.body":
            sent.append(message["body"].decode())
            slow.append(message["body"].decode())
            ended.append(not message["more_body"])

    def written(body: bytes) -> bool:
        assert write is not None
        if taken := write(body):
            sent.append(body.decode())
        return taken

    scope: dict[str, Any] = {"type": "http"} if write is None else {"type": "http", WRITE: written}
    stream = EventStream(news, news.lines(), close=lambda: closed.append(True))  # type: ignore[arg-type]
    task = asyncio.create_task(stream(scope, receive, send))
    try:
        for number, text in enumerate(texts):
            await asyncio.sleep(0.001)
            news.put(text)
            if number == leave_after:
                gone.set()
        await asyncio.wait_for(task, 10)
    finally:
        assert closed == [True]
    return sent, slow, any(ended)


@pytest.mark.parametrize("seconds", [0, 0.005])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_all_texts_come_in_order(every: int, seconds: float) -> None:
    """`every` so many texts there is no room for the next; 0 is a server that can only `send`."""
    calls = 0

    def write(body: bytes) -> bool:
        nonlocal calls
        calls += 1
        return every > 1 and calls % every > 0

    sent, slow, ended = asyncio.run(streamed(TEXTS, write if every else None, seconds=seconds))
    assert "".join(sent) == "".join(TEXTS) + "end"
    assert ended
    if every < 2:
        assert slow == sent


def test_what_can_be_written_at_once_is_not_sent() -> None:
    sent, slow, _ = asyncio.run(streamed(TEXTS, lambda body: True, seconds=0))
    assert "".join(sent) == "".join(TEXTS) + "end"
    assert slow == [""]


def test_what_comes_while_a_reader_is_slow_is_joined() -> None:
    sent, _, _ = asyncio.run(streamed(TEXTS, lambda body: False, seconds=0.02))
    assert "".join(sent) == "".join(TEXTS) + "end"
    assert len(sent) < len(TEXTS)


def test_an_error_in_the_lines_ends_the_stream() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(streamed([*TEXTS, "broken"], lambda body: True, seconds=0))


@pytest.mark.parametrize("room", [True, False])
def test_a_client_that_leaves_ends_the_stream(room: bool) -> None:
    sent, _, ended = asyncio.run(streamed([*TEXTS, *TEXTS], lambda body: room, seconds=0.001, leave_after=5))
    assert len("".join(sent)) < len("".join([*TEXTS, *TEXTS]))
    assert not ended
