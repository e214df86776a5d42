"""Requests that are broken off at any moment leave nothing behind: no page, task, thread or file descriptor."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.config import EngineConfig
from tests.server.running import HEADERS, Served, serving
from tests.server.wire import Wire

CONFIG = EngineConfig(max_batch_size=16, num_tokens_per_iter=256, cache_max_entry_count=200, cache_block_seq_len=16)
AT_ONCE = 24
WORDS = [
    "What",
    "animal",
    "lives",
    "with",
    "Odette",
    "Vickers?",
    "When",
    "is",
    "the",
    "birthday",
    "of",
    "Nollis",
    "Norwood?",
]


@pytest.fixture(scope="module")
def served(demo_folder: Path) -> Iterator[Served]:
    with serving(demo_folder, None, CONFIG, max_requests=100_000) as found:
        yield found


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    if rng.random() < 0.1:
        session = {"session_id": rng.randint(0, 50), "interactive_mode": rng.random() < 0.5}
        return "/v1/chat/interactive", {"prompt": text, "stream": rng.random() < 0.5, "ignore_eos": True} | session
    body: dict[str, Any] = {"model": "tiny", "stream": rng.random() < 0.6, "ignore_eos": True}
    for name, value in (
        ("n", rng.randint(1, 6)),
        ("temperature", rng.choice([0, 0.7, 1.5])),
        ("top_p", rng.uniform(0.1, 1)),
        ("top_k", rng.choice([1, 5, 50])),
        ("min_p", rng.uniform(0, 0.2)),
        ("presence_penalty", rng.uniform(-2, 2)),
        ("frequency_penalty", rng.uniform(-2, 2)),
        ("repetition_penalty", rng.uniform(0.8, 1.5)),
        ("logit_bias", {str(rng.randrange(1000)): rng.uniform(-100, 100)}),
        ("stop", rng.choices(["the", " in ", "pigeon", "zzz"], k=2)),
        ("seed", rng.randrange(2**40)),
        ("max_tokens", rng.randint(1, 300)),
    ):
        if rng.random() < 0.4:
            body[name] = value
    if rng.random() < 0.5:
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
        if rng.random() < 0.2:
            chat |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
        if rng.random() < 0.1:
            del body["ignore_eos"]
            chat |= {"response_format": {"type": "json_object"}}
        return "/v1/chat/completions", body | chat
    return "/v1/completions", body | {"prompt": text}


async def ask_and_leave(served: Served, rng: random.Random) -> str:
    """One request, broken off somewhere; says where."""
    path, body = random_request(rng)
    wire = await Wire.open(served.url)
    where = rng.choice(["in its bytes", "at once", "soon", "later", "in its answer", "after its answer"])
    wire.send(path, body, share=rng.random() if where == "in its bytes" else 1.0)
    try:
        if where in ("soon", "later"):
            await asyncio.sleep(rng.random() * (0.01 if where == "soon" else 0.2))
        elif where == "in its answer":
            await wire.reader.read(rng.randint(1, 4000))
        elif where == "after its answer" and not body["stream"]:
            status = int((await wire.reader.readline()).split()[1])
            # 409: another round of that session runs; 400: it is full.
            assert status == 200 or (path.endswith("interactive") and status in (400, 409))
            await wire.reader.readuntil(b"\r\n\r\n")
            await wire.reader.read(1)
    finally:
        rng.choice([wire.close, wire.reset])()
    return where


def holdings(served: Served) -> dict[str, int]:
    """What the server, which is this process, and its engine hold."""

    async def tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    engine = psutil.Process(served.client.process_id)
    return {
        "tasks": asyncio.run_coroutine_threadsafe(tasks(), served.loop).result(20),
        "threads": psutil.Process().num_threads(),
        "file descriptors": psutil.Process().num_fds(),
        "streams": len(served.client._streams) + len(served.client._accepted),
        "the engine's threads": engine.num_threads(),
        "the engine's file descriptors": engine.num_fds(),
        "the engine's requests": served.unfinished(),  # it checks its pages too
    }


def figures(served: Served) -> dict[str, float]:
    return asyncio.run_coroutine_threadsafe(served.client.figures(), served.loop).result(20)


def answers(served: Served) -> bool:
    """A whole answer, by the way of which threads that were idle for long are let go."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)
    return answer.status_code == 200


def abort_many(served: Served, count: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)

    async def run() -> Counter[str]:
        begun = iter(range(count))
        found: Counter[str] = Counter()

        async def one_after_another() -> None:
            for _ in begun:
                found[await ask_and_leave(served, rng)] += 1

        await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
        return found

    return asyncio.run(run())


def leaks(served: Served, before: dict[str, int]) -> dict[str, int]:
    """What is held beyond `before`, once that does not change any more."""
    deadline = time.monotonic() + 60
    while True:
        assert answers(served)
        more = {name: held - before[name] for name, held in holdings(served).items() if held > before[name]}
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.5)


def broken_off(served: Served, count: int, seed: int) -> dict[str, int]:
    """Leaks of `count` requests, after some that start what is kept: threads, and the processes of templates and
    grammars."""
    rest = holdings(served)
    abort_many(served, 60, seed=-1)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
    body |= {"response_format": {"type": "json_object"}}
    httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)
    time.sleep(1)
    before = holdings(served) | {name: rest[name] for name in ("tasks", "streams", "the engine's requests")}
    found = abort_many(served, count, seed)
    assert found.total() == count
    assert len(found) == 6
    more = leaks(served, before)
    assert figures(served) | {"preemptions": 0} == {"running": 0, "waiting": 0, "cache_usage": 0, "preemptions": 0}
    return more


def test_what_is_broken_off_leaves_nothing_behind(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    assert broken_off(served, 150, seed=1) == {}
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_what_is_broken_off_leaves_nothing_behind_soak(
    served: Served, soak_row: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    soak_row["failures"] = 1
    more = broken_off(served, 10_000, seed=2)
    soak_row |= {"count": 10_000, "failures": len(more)}
    assert more == {}
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
