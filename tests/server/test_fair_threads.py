import asyncio
import threading
import time

import pytest

from server.fair_threads import FairThreads


def test_owners_take_turns_and_no_more_than_so_many_run() -> None:
    running, most, order = 0, 0, []
    lock, all_are_in_line = threading.Lock(), threading.Event()

    def work(name: str) -> str:
        nonlocal running, most
        assert all_are_in_line.wait(30)
        with lock:
            running += 1
            most = max(most, running)
            order.append(name)
        time.sleep(0.002)
        with lock:
            running -= 1
        return name

    async def run() -> None:
        threads = FairThreads(2)
        flood = [asyncio.create_task(threads.run("a", lambda: work("a"))) for _ in range(20)]
        await asyncio.sleep(0)
        other = [asyncio.create_task(threads.run(name, lambda name=name: work(name))) for name in "bcb"]
        await asyncio.sleep(0.01)
        all_are_in_line.set()
        assert await asyncio.gather(*flood, *other) == ["a"] * 20 + ["b", "c", "b"]

    asyncio.run(run())
    assert most == 2
    # Two ran already, and one of each owner that is in line may come before; after that it is everybody's turn. Two run
    # at once, so neighbours may have begun the other way round.
    assert {"b", "c"} <= set(order[2:6])
    assert order[:9].count("b") == 2


def test_who_gives_up_keeps_nobody_waiting_and_errors_are_handed_on() -> None:
    async def run() -> None:
        threads = FairThreads(1)
        go = threading.Event()
        first = asyncio.create_task(threads.run("a", go.wait))
        await asyncio.sleep(0.01)
        given_up = [asyncio.create_task(threads.run("a", lambda: 1 / 0)) for _ in range(3)]
        last = asyncio.create_task(threads.run("b", lambda: 5))
        await asyncio.sleep(0.01)
        for task in given_up[:2]:
            task.cancel()
        go.set()
        assert await asyncio.wait_for(last, 10) == 5
        assert await first
        with pytest.raises(ZeroDivisionError):
            await given_up[2]
        assert await asyncio.wait_for(threads.run("c", lambda: 7), 10) == 7

    asyncio.run(run())
