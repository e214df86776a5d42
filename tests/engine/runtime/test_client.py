import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig, Sampling
from engine.runtime.client import EngineClient, EngineError
from engine.runtime.engine import Engine
from tests.tiny_artifact import write_tiny_artifact

CONFIG = EngineConfig(max_batch_size=8, num_tokens_per_iter=64, cache_max_entry_count=200, cache_block_seq_len=16)
Run = Callable[[Callable[[EngineClient], Awaitable[None]]], None]
PROMPT = [0, 50, 60, 70, 80]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact")
    write_tiny_artifact(path)
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    """Runs a test with a client that the module shares; afterwards no process is left."""
    with asyncio.Runner() as runner:
        client = EngineClient(folder, CONFIG)
        runner.run(client.start())
        yield lambda test: runner.run(asyncio.wait_for(test(client), 60))
        runner.run(client.close())
    assert client.process_id is not None
    assert not psutil.pid_exists(client.process_id)


async def text_of(events: AsyncIterator[object]) -> tuple[str, str]:
    pieces = [event async for event in events]
    return "".join(event.text for event in pieces), pieces[-1].finish_reason


def test_answers_are_those_of_the_engine(folder: Path, run: Run) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=0.0, ignore_eos=True, stop=("never said",))
    [expected] = Engine.from_workspace(folder, CONFIG).generate([PROMPT], sampling)

    async def test(client: EngineClient) -> None:
        assert client.session_len == 128
        answers = await asyncio.gather(*(text_of(client.generate(PROMPT, sampling)) for _ in range(5)))
        assert answers == [(expected.text, expected.finish_reason)] * 5

    run(test)


def test_refusals_leave_the_engine_running(run: Run) -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(ValueError, match="1000 tokens"):
            await client.submit([3] * 1000, Sampling())
        with pytest.raises(ValueError, match="token id 99999"):
            await client.submit([99999], Sampling())
        with pytest.raises(ValueError, match="top_p is 7"):
            await client.submit(PROMPT, Sampling(top_p=7))
        assert await client.unfinished() == 0
        assert await text_of(client.generate(PROMPT, Sampling(max_new_tokens=2, ignore_eos=True)))

    run(test)


def test_closing_a_stream_early_frees_the_request(run: Run) -> None:
    async def test(client: EngineClient) -> None:
        streams = [await client.submit(PROMPT, Sampling(max_new_tokens=120, ignore_eos=True)) for _ in range(6)]
        assert await client.unfinished() == 6
        async for _ in streams[0]:
            break
        for stream in streams:
            stream.close()
        assert await client.unfinished() == 0

        waiting = asyncio.create_task(text_of(client.generate(PROMPT, Sampling(max_new_tokens=120, ignore_eos=True))))
        while await client.unfinished() == 0:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await client.unfinished() == 0

    run(test)


def test_an_idle_engine_uses_no_processor(run: Run) -> None:
    async def test(client: EngineClient) -> None:
        await text_of(client.generate(PROMPT, Sampling(max_new_tokens=4)))
        process = psutil.Process(client.process_id)
        before = process.cpu_times()
        await asyncio.sleep(1.0)
        after = process.cpu_times()
        assert (after.user + after.system) - (before.user + before.system) < 0.1

    run(test)


def test_the_death_of_the_engine_ends_every_stream(folder: Path) -> None:
    async def session() -> None:
        client = EngineClient(folder, CONFIG)
        await client.start()
        sampling = Sampling(max_new_tokens=120, ignore_eos=True)
        streams = [await client.submit(PROMPT, sampling) for _ in range(3)]
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineError, match="killed by signal 9"):
                async for _ in stream:
                    pass
        await client.wait_ended()
        assert "signal 9" in str(client.error)
        with pytest.raises(EngineError, match="signal 9"):
            await client.submit(PROMPT, sampling)
        await client.close()

    asyncio.run(session())


def test_close_ends_open_streams(folder: Path) -> None:
    async def session() -> None:
        client = EngineClient(folder, CONFIG)
        with pytest.raises(EngineError, match="not started"):
            await client.submit(PROMPT, Sampling())
        await client.start()
        stream = await client.submit(PROMPT, Sampling(max_new_tokens=120, ignore_eos=True))
        await client.close()
        await client.close()
        with pytest.raises(EngineError, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(session())


@pytest.mark.parametrize("broken", ["no folder", "flipped byte", "another id"])
def test_what_cannot_be_loaded_is_said_by_the_parent(tmp_path: Path, broken: str) -> None:
    artifact_id = None
    message = "nowhere"
    target = tmp_path / ("nowhere" if broken == "no folder" else "artifact")
    if broken != "no folder":
        write_tiny_artifact(target)
    if broken == "flipped byte":
        weight = target / "triton_models/weights/norm.weight"
        content = weight.read_bytes()
        weight.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        message = r"norm\.weight has changed"
    if broken == "another id":
        artifact_id, message = "0" * 64, "does not have the id"

    async def session() -> None:
        client = EngineClient(target, CONFIG, artifact_id=artifact_id)
        with pytest.raises(ValueError, match=message):
            await client.start()
        assert client.process_id is not None
        assert not psutil.pid_exists(client.process_id)

    asyncio.run(session())


def test_the_engine_dies_with_its_parent(folder: Path) -> None:
    code = f"""
        import asyncio
        from pathlib import Path
        from engine.config import EngineConfig, Sampling
        from engine.runtime.client import EngineClient

        async def main():
            client = EngineClient(Path({str(folder)!r}), EngineConfig(cache_max_entry_count=200))
            await client.start()
            await client.submit([1, 2, 3], Sampling(max_new_tokens=120, ignore_eos=True))
            print(client.process_id, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 10
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)
