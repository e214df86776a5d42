"""The asyncio side of an engine process: start it, send requests, read their events. Needs no torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.config import EngineConfig, Grammar, Sampling
from engine.runtime import channel
from engine.runtime.channel import Message
from engine.runtime.event import Event
from engine.runtime.messages import pack_sampling, unpack_event
from engine.runtime.stream import Stream

SECONDS_TO_END = 5.0
PACKAGES = str(Path(__file__).resolve().parents[2])


class EngineError(RuntimeError):
    """The engine process cannot answer: it has ended, or was closed."""


class EngineClient:
    """Starts an engine process for a workspace folder and talks to it. It ends with this process, whatever happens.

    `verify` checks every byte of the folder against its manifest, and the manifest against `artifact_id` if given.
    `goldens` is a file that the engine replays before it is ready (`selftest.check_goldens`), `self_test` its outcome.
    Call `start` from a thread that lives as long as the client: Linux ends the engine with the thread that made it.
    """

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        *,
        verify: bool = True,
        artifact_id: str | None = None,
        goldens: Path | None = None,
        waived: bool = False,
    ) -> None:
        self.session_len = 0
        self.vocab_size = 0
        self.eos_token_ids: tuple[int, ...] = ()
        self.self_test: str | None = None
        self.process_id: int | None = None
        self._load = {
            "type": "load",
            "folder": str(folder),
            "config": asdict(config),
            "verify": verify,
            "artifact_id": artifact_id,
            "goldens": None if goldens is None else str(goldens),
            "waived": waived,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._streams: dict[str, Stream] = {}
        self._accepted: dict[str, asyncio.Future[None]] = {}
        self._states: list[asyncio.Future[int]] = []
        self._figures: list[asyncio.Future[dict[str, float]]] = []
        self._error: EngineError | None = EngineError("the engine was not started")
        self._said_last: str | None = None
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def error(self) -> EngineError | None:
        """Why no request can be answered; None while the engine runs."""
        return self._error

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. ValueError, in the engine's words, if it cannot be."""
        ours, theirs = socket.socketpair()
        with theirs:
            # -P and PYTHONPATH: the same package as here, whatever lies in the working directory.
            command = [sys.executable, "-P", "-m", "engine.runtime.process"]
            command += ["--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])}
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        self.process_id = self._process.pid
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            self._writer.write(channel.pack(self._load))
            answer = await self._read(reader)
        except BaseException:
            await self.close()
            raise
        if answer is None or answer["type"] == "failed":
            await self.close()
            raise EngineError(self._last_words()) if answer is None else ValueError(answer["message"])
        self.session_len, self.vocab_size = answer["session_len"], answer["vocab_size"]
        self.eos_token_ids = tuple(answer["eos_token_ids"])
        self.self_test = answer.get("self_test")
        self._error = None
        self._reading = asyncio.create_task(self._run(reader))

    async def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, owner: str = "", priority: int = 0
    ) -> Stream:
        """Send a request of an owner (see `Engine.add`); returns once the engine has accepted it. ValueError, in the
        engine's words, if it refuses."""
        writer = self._ready_writer()
        stream = Stream(self.abort, uuid.uuid4().hex)
        accepted = asyncio.get_running_loop().create_future()
        self._streams[stream.request_id] = stream
        self._accepted[stream.request_id] = accepted
        message: channel.Message = {"type": "add", "request_id": stream.request_id, "prompt_ids": list(prompt_ids)}
        message |= {"owner": owner, "priority": priority}
        try:
            writer.write(channel.pack({**message, "sampling": pack_sampling(sampling)}))
            await writer.drain()
            await accepted
        except BaseException:
            stream.close()
            raise
        finally:
            self._accepted.pop(stream.request_id, None)
        return stream

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> AsyncIterator[Event]:
        """The events of one request, which is aborted when the iterator is closed early."""
        stream = await self.submit(prompt_ids, sampling)
        try:
            async for event in stream:
                yield event
        finally:
            stream.close()

    def warm_grammars(self) -> None:
        """Tell the engine that grammars will come, so that it prepares for them beside its steps."""
        self._ready_writer().write(channel.pack({"type": "warm_grammars"}))

    async def learn_grammar(self, grammar: Grammar, compiled: Grammar) -> None:
        """Send the engine what a GrammarCompiler made of a grammar, ahead of the requests that name it."""
        writer = self._ready_writer()
        writer.write(channel.pack({"type": "grammar", "grammar": asdict(grammar), "compiled": asdict(compiled)}))
        await writer.drain()

    def abort(self, request_id: str) -> None:
        """End a request and free its pages; one that is over is left alone."""
        if self._streams.pop(request_id, None) and self._error is None and self._writer:
            self._writer.write(channel.pack({"type": "abort", "request_id": request_id}))

    async def unfinished(self) -> int:
        """How many requests the engine holds, after it has checked that no page is lost."""
        writer = self._ready_writer()
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._states.append(answer)
        writer.write(channel.pack({"type": "state"}))
        return await answer

    async def figures(self) -> dict[str, float]:
        """What the scheduler says of itself, see `Scheduler.figures`."""
        writer = self._ready_writer()
        answer: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._figures.append(answer)
        writer.write(channel.pack({"type": "figures"}))
        return await answer

    async def wait_ended(self) -> None:
        """Return when the engine has ended, by `close` or on its own; `error` says why."""
        await self._ended.wait()

    async def close(self) -> None:
        """End the engine process and every open stream. May be called twice."""
        self._fail(EngineError("the engine was closed"))
        if self._writer:
            self._writer.close()
        if self._process and self._process.poll() is None:
            try:
                # A closed channel ends the process between two steps; a kill is for one that hangs in a step.
                await asyncio.to_thread(self._process.wait, SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        if self._reading:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading

    def _ready_writer(self) -> asyncio.StreamWriter:
        if self._error or self._writer is None:
            raise self._error or EngineError("the engine was not started")
        return self._writer

    async def _run(self, reader: asyncio.StreamReader) -> None:
        while (message := await self._read(reader)) is not None:
            self._take(message)
        if self._process:
            await asyncio.to_thread(self._process.wait)
        self._fail(EngineError(self._last_words()))

    async def _read(self, reader: asyncio.StreamReader) -> Message | None:
        """The next message; None when the engine has closed the channel."""
        try:
            header = await reader.readexactly(channel.HEADER)
            return channel.unpack(await reader.readexactly(channel.content_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _take(self, message: Message) -> None:
        match message["type"]:
            case "events":
                told: dict[Callable[[], None], None] = {}
                for event in map(unpack_event, message["events"]):
                    stream = self._streams.get(event.request_id)
                    if stream:
                        stream.put(event)
                        told[stream.on_arrival] = None
                    if event.finish_reason:
                        self._streams.pop(event.request_id, None)
                for tell in told:
                    tell()
            case "accepted":
                self._settle(message["request_id"], None)
            case "refused":
                self._streams.pop(message["request_id"], None)
                self._settle(message["request_id"], ValueError(message["message"]))
            case "figures":
                figures = self._figures.pop(0)
                if not figures.done():  # nobody waits any more
                    figures.set_result(message["figures"])
            case "state":
                self._states.pop(0).set_result(message["unfinished"])
            case "ended":
                self._said_last = message["message"]

    def _settle(self, request_id: str, error: Exception | None) -> None:
        future = self._accepted.get(request_id)
        if future and not future.done():
            if error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _fail(self, error: EngineError) -> None:
        """End every waiting call and stream with `error`; the first error stays."""
        if self._ended.is_set():
            return
        self._error = error
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        for request_id in list(self._accepted):
            self._settle(request_id, error)
        for figures in self._figures:
            if not figures.done():
                figures.set_exception(error)
        for state in self._states:
            if not state.done():
                state.set_exception(error)
        self._ended.set()

    def _last_words(self) -> str:
        if self._said_last is not None:
            return self._said_last
        code = self._process.poll() if self._process else None
        how = (
            "ended" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        )
        return f"the engine process {how}; what it said before is on standard error"
