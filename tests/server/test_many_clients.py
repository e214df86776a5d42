"""Many clients of one server, a process of its own on two cores: streams are whole, whoever else is slow or dies."""

import asyncio
import functools
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.conftest import DEMO
from tests.server.wire import Wire

KEYS = {"a": "key-of-a", "b": "key-of-b"}
COMPLETIONS = "/v1/completions"
SAMPLE = re.compile(r'ingot:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{model_name="demo"\} (\S+)')
QUESTIONS = [json.loads(line)["messages"] for line in (DEMO.parent / "text/questions.jsonl").read_text().splitlines()]
VOCABULARY = range(10, 1000)


@contextmanager
def serving(folder: Path, keys: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "cli.main", "serve", f"folder={folder}", "serve.port=0", "serve.model_name=demo"]
    command += [f"serve.api_key_file={keys}", "serve.access_log=none", "serve.max_requests=2000", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(line.split()[1] for line in process.stdout if line.startswith("URL"))
            yield url, psutil.Process(process.pid)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    return file


@pytest.fixture(scope="module")
def server(demo_folder: Path, keys: Path) -> Iterator[tuple[str, psutil.Process]]:
    with serving(demo_folder, keys) as found:
        yield found


def body(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens}
    return {"model": "demo", "prompt": prompt, **greedy, **more}


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1, *rng.choices(VOCABULARY, k=12)] for _ in range(count)]


@functools.cache
def client_of(url: str) -> httpx.Client:
    """One for all questions: to make one takes longer than some of what is measured here."""
    return httpx.Client(base_url=url, timeout=30)


def state(url: str) -> dict[str, float]:
    """What the engine holds, as /metrics says it."""
    answer = client_of(url).get("/metrics", headers={"Authorization": f"Bearer {KEYS['a']}"})
    return {name: float(value) for name, value in SAMPLE.findall(answer.text)}


async def until_idle(url: str, seconds: float) -> float:
    """Seconds until the engine holds nothing; AssertionError where it holds something for longer than it may."""
    began = time.monotonic()
    while any((held := state(url)).values()):
        assert time.monotonic() - began < seconds, held
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def stream(url: str, key: str, asked: dict[str, Any]) -> tuple[dict[int, str], dict[str, Any] | None]:
    asked = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    return await (await Wire.post(url, COMPLETIONS, asked, key=KEYS[key])).texts()


async def whole_streams(url: str, count: int, tokens: int) -> list[str]:
    """What is wrong with `count` streams that are open at once, each compared with the same request, not streamed."""
    made = prompts(count, seed=count)
    wires = [await Wire.open(url) for _ in made]
    for wire, prompt in zip(wires, made, strict=True):
        more = {"stream": True, "stream_options": {"include_usage": True}}
        wire.send(COMPLETIONS, body(prompt, tokens, **more), key=KEYS["a"])
    streamed = await asyncio.gather(*(wire.texts() for wire in wires))
    wrong = []
    headers = {"Authorization": f"Bearer {KEYS['b']}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as http:
        for prompt, (texts, usage) in zip(made, streamed, strict=True):
            alone = (await http.post(COMPLETIONS, json=body(prompt, tokens))).json()["choices"][0]["text"]
            if usage is None or usage["completion_tokens"] != tokens:
                wrong.append(f"{prompt}: usage {usage}")
            if texts != {0: alone}:
                wrong.append(f"{prompt}: {texts} instead of {alone!r}")
    return wrong


def test_streams_lose_no_token_and_no_order(server: tuple[str, psutil.Process]) -> None:
    assert asyncio.run(whole_streams(server[0], 24, tokens=24)) == []


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_streams_lose_no_token_and_no_order_soak(server: tuple[str, psutil.Process], soak_row: dict[str, int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    soak_row["count"] = 500
    wrong = asyncio.run(whole_streams(server[0], 500, tokens=64))
    soak_row["failures"] = len(wrong)
    assert wrong == []


async def seconds_for(url: str, key: str, count: int, tokens: int) -> float:
    """For `count` streams, one after the other."""
    began = time.monotonic()
    for prompt in prompts(count, seed=5):
        await stream(url, key, body(prompt, tokens))
    return time.monotonic() - began


async def slow_readers(
    server: tuple[str, psutil.Process], count: int, *, tokens: int, others: int
) -> tuple[float, int]:
    """How many times longer others take beside `count` readers who do not read, and the bytes that these cost."""
    url, process = server
    quick = {"key": "b", "count": others, "tokens": 20}
    await seconds_for(url, **quick)
    asked = body([1, 500, 600], tokens, n=4, stream=True, stream_options={"include_usage": True})
    [expected] = set((await stream(url, "a", asked))[0].values())
    before, memory = await seconds_for(url, **quick), process.memory_info().rss
    readers = [await Wire.post(url, COMPLETIONS, asked, key=KEYS["a"], receive_buffer=4096) for _ in range(count)]
    # Nobody reads, and the engine ends all the same: it waits for no reader, and their pages are free.
    while state(url)["num_requests_running"] == 0:
        await asyncio.sleep(0.005)
    await until_idle(url, 900)
    grown = process.memory_info().rss - memory
    beside = await seconds_for(url, **quick)
    for reader in readers:
        texts, usage = await reader.texts()
        assert texts == dict.fromkeys(range(4), expected), "a slow reader gets all of it"
        assert usage is not None
        assert usage["completion_tokens"] == 4 * tokens
    return beside / before, grown


def test_slow_readers_hold_up_nobody(server: tuple[str, psutil.Process]) -> None:
    _, grown = asyncio.run(slow_readers(server, 3, tokens=200, others=3))
    assert grown < 32 << 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_slow_readers_hold_up_nobody_soak(server: tuple[str, psutil.Process], soak_row: dict[str, int]) -> None:
    soak_row["failures"] = 1
    times, grown = asyncio.run(slow_readers(server, 100, tokens=200, others=30))
    print(f"{times:.2f} times as long beside 100 slow readers, who cost {grown >> 20} MiB")
    assert times < 1.5
    assert grown < 128 << 20
    soak_row |= {"count": 100, "failures": 0}


CLIENT = """
import socket, sys
host, port, head = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with socket.create_connection((host, port)) as connection:
    connection.sendall(head.encode())
    while connection.recv(1000):
        print("read", flush=True)
"""


async def killed_client(url: str, answers: int) -> float:
    """Seconds from the kill -9 of a client that was reading a stream until the engine holds nothing of it."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body([1, 300, 400], 480, n=answers, stream=True))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['a']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n{content}"
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, host, port, head], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        for _ in range(5):
            assert client.stdout.readline() == "read\n"
        assert state(url)["num_requests_running"] == answers
        os.kill(client.pid, signal.SIGKILL)
        return await until_idle(url, 20)


def test_a_killed_client_frees_its_pages(server: tuple[str, psutil.Process]) -> None:
    asyncio.run(killed_client(server[0], 24))  # alone, these take longer than the kill


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_killed_client_frees_its_pages_within_a_second_soak(
    server: tuple[str, psutil.Process], soak_row: dict[str, int]
) -> None:
    took = []
    for _ in range(50):
        took.append(asyncio.run(killed_client(server[0], 24)))
        soak_row["count"] += 1
        soak_row["failures"] += took[-1] > 1
    print(f"{statistics.median(took):.3f} s, at most {max(took):.3f} s")
    assert soak_row["failures"] == 0


async def first_token(url: str, question: str) -> float:
    """Seconds from a question of key b to the first piece of its answer, on a connection of its own."""
    asked = {"model": "demo", "stream": True, "temperature": 0, "max_tokens": 4}
    began = time.monotonic()
    wire = await Wire.post(url, "/v1/chat/completions", {**asked, "messages": question}, key=KEYS["b"])
    found = None
    while (event := await wire.event()) is not None:
        if found is None and any(choice["delta"].get("content") for choice in event["choices"]):
            found = time.monotonic() - began
    wire.close()
    assert found is not None
    return found


@asynccontextmanager
async def flood(url: str, waiting: int) -> AsyncIterator[None]:
    """64 requests of key a that run and so many that wait; for each that ends, another one comes."""
    open_: set[Wire] = set()

    async def one_after_another(prompt: list[int]) -> None:
        while True:
            wire = await Wire.post(url, COMPLETIONS, body(prompt, 200, stream=True), key=KEYS["a"])
            open_.add(wire)
            await wire.texts()
            open_.remove(wire)

    tasks = [asyncio.create_task(one_after_another(prompt)) for prompt in prompts(64 + waiting, seed=3)]
    while state(url)["num_requests_waiting"] < waiting - 5:
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for wire in open_:
            wire.close()
        await until_idle(url, 60)


async def first_tokens(url: str, count: int, rng: random.Random) -> list[float]:
    found = []
    for question in rng.sample(QUESTIONS, count):
        await asyncio.sleep(rng.random() * 0.05)
        found.append(await first_token(url, question))
    return found


def test_two_hundred_waiting_of_one_key_leave_another_its_turn(server: tuple[str, psutil.Process]) -> None:
    async def run() -> float:
        async with flood(server[0], waiting=100):
            await first_tokens(server[0], 3, random.Random(1))
            return state(server[0])["num_requests_waiting"]

    assert asyncio.run(run()) > 80, "the other key's answers waited for these"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_waiting_of_one_key_leave_another_its_first_token_soak(
    server: tuple[str, psutil.Process], soak_row: dict[str, int]
) -> None:
    """Its median on a server that is busy with them is at most twice that on one that does nothing at all."""

    async def run() -> tuple[list[float], list[float]]:
        idle: list[float] = []
        busy: list[float] = []
        rng = random.Random(2)
        await first_tokens(server[0], 5, rng)
        for _ in range(5):
            idle += await first_tokens(server[0], 20, rng)
            async with flood(server[0], waiting=200):
                busy += await first_tokens(server[0], 20, rng)
        return idle, busy

    idle, busy = asyncio.run(run())
    soak_row |= {"count": len(busy), "failures": 1}
    times = statistics.median(busy) / statistics.median(idle)
    said = [f"{1e3 * value:.1f} ms" for each in (idle, busy) for value in statistics.quantiles(each, n=4)]
    print(f"first token, quartiles: idle {', '.join(said[:3])}; busy {', '.join(said[3:])}: {times:.2f} times")
    assert times <= 2
    soak_row["failures"] = 0
