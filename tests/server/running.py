"""A server in a thread: uvicorn on a loopback port, over an engine process with a tiny model."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from engine.config import EngineConfig
from engine.runtime.client import EngineClient
from engine.runtime.tokenizer import Tokenizer
from server import event_loop
from server.app import create_app
from server.config import AppConfig, ServedModel
from server.connection import connection_class

KEY = "a-test-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass(slots=True, kw_only=True)
class Served:
    url: str
    artifact_id: str | None
    tokenizer: Tokenizer
    client: EngineClient
    loop: asyncio.AbstractEventLoop

    def unfinished(self) -> int:
        """How many requests the engine holds, after it has checked its pages."""
        return asyncio.run_coroutine_threadsafe(self.client.unfinished(), self.loop).result(20)


@contextmanager
def serving(
    folder: Path, artifact_id: str | None, config: EngineConfig, *, head_timeout: float = 20.0, **options: object
) -> Iterator[Served]:
    """`options` are more fields of AppConfig. Without an `artifact_id` the folder is taken unverified."""
    ready: threading.Event = threading.Event()
    found: list[Served] = []
    errors: list[BaseException] = []
    stop: list[uvicorn.Server] = []

    async def run() -> None:
        tokenizer = Tokenizer(folder / "triton_models/tokenizer")
        async with EngineClient(folder, config, verify=artifact_id is not None, artifact_id=artifact_id) as client:
            model = ServedModel(name="tiny", artifact_id=artifact_id, recipe="fp16", verdict="pass")
            app = create_app(client, tokenizer, AppConfig(model=model, **{"keys": {"test": KEY}, **options}))
            connection = connection_class(head_timeout, app.state.metrics.refused)
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, http=connection))
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            loop = asyncio.get_running_loop()
            url = f"http://127.0.0.1:{port}"
            found.append(Served(url=url, artifact_id=artifact_id, tokenizer=tokenizer, client=client, loop=loop))
            stop.append(server)
            ready.set()
            await task

    def thread() -> None:
        try:
            event_loop.run(run())
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    worker = threading.Thread(target=thread)
    worker.start()
    assert ready.wait(120)
    if errors:
        raise errors[0]
    yield found[0]
    stop[0].should_exit = True
    worker.join(30)
    assert not worker.is_alive()
    assert not errors
