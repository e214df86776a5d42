"""The engine in a process of its own: `python -m engine.runtime.process --fd N --parent PID`, started by client.py.

In come `load` (first), `add`, `grammar`, `warm_grammars`, `abort`, `state` and `figures`; out go `ready` or `failed`,
then `accepted`, `refused`, `events`, `state` and `figures`, and `ended` where another tensor-parallel rank has died.
The loop sleeps in the socket while nothing is to be computed; messages come in between steps.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig, Grammar
from engine.runtime.channel import Channel, Message
from engine.runtime.messages import unpack_sampling
from engine.storage import artifacts

if TYPE_CHECKING:
    from engine.runtime.engine import Engine

SECONDS_TO_TELL = 1.0
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def die_with_parent(parent: int) -> None:
    """Ask Linux for a SIGKILL when the parent ends, and end now if it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def load(message: Message) -> tuple[Engine, Message]:
    """The engine that `load` asks for and the answer to it. ValueError or OSError if the folder cannot be served.

    With `verify` every byte is checked against the manifest, whose id must be `artifact_id` if that is given. With
    `goldens` (a file) the engine must compute what they hold, unless that is `waived`; the answer says how it went.
    """
    folder, config = Path(message["folder"]), EngineConfig(**message["config"])
    if message["verify"]:
        engine = _load_verified(folder, config, message["artifact_id"])
    else:
        engine = _engine(folder, config)
    known: Message = {"session_len": engine.session_len, "vocab_size": engine.vocab_size}
    if message.get("goldens") is not None:
        from engine.runtime.selftest import check_goldens

        known["self_test"] = check_goldens(
            engine, Path(message["goldens"]), artifact_id=message["artifact_id"], waived=message.get("waived", False)
        )
    return engine, {"type": "ready", **known, "eos_token_ids": list(engine.eos_token_ids)}


def _load_verified(folder: Path, config: EngineConfig, artifact_id: str | None) -> Engine:
    """The engine of an artifact all of whose bytes are checked. Weights that are streamed to a device are read once:
    they are hashed on the way, and judged when all are there."""
    if not config.streams_weights:
        artifacts.verify(folder, artifact_id)  # before torch, which takes seconds to import
        return _engine(folder, config)
    from engine.storage.workspace import weight_paths

    streamed = weight_paths(folder)
    manifest = artifacts.verify(folder, artifact_id, later=streamed)
    digests: dict[str, str] = {}
    try:
        engine = _engine(folder, config, digests)
    except Exception:  # by damage, perhaps, of which this is the better message; who interrupts does not wait for it
        artifacts.verify_digests(folder, manifest, streamed, digests)
        raise
    artifacts.verify_digests(folder, manifest, streamed, digests)
    return engine


def _engine(folder: Path, config: EngineConfig, digests: dict[str, str] | None = None) -> Engine:
    from engine.runtime.engine import Engine

    return Engine.from_workspace(folder, config, digests=digests)


def ender(channel: Channel) -> Callable[[OSError], None]:
    """What ends this process and says why: in the thread that sees a rank die, since a step may be stuck in it."""
    once = threading.Lock()

    def end(error: OSError) -> None:
        once.acquire()  # never released: whoever comes second waits for the end
        threading.Timer(SECONDS_TO_TELL, os._exit, (1,)).start()
        with contextlib.suppress(OSError):
            channel.send({"type": "ended", "message": str(error)})
        os._exit(1)

    return end


class Service:
    """Answers messages with an engine until the client closes the channel."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._unfinished: set[str] = set()

    def run(self) -> None:
        while True:
            for message in self._channel.receive(wait=not self._engine.has_work()):
                self._take(message)
            if self._engine.has_work():
                events = self._engine.step()
                self._unfinished -= {event.request_id for event in events if event.finish_reason}
                if events:
                    self._channel.send({"type": "events", "events": events})

    def _take(self, message: Message) -> None:
        match message["type"]:
            case "add":
                self._add(message)
            case "warm_grammars":
                threading.Thread(target=self._engine.grammars.warm, daemon=True).start()
            case "grammar":
                self._engine.grammars.learn(Grammar(**message["grammar"]), Grammar(**message["compiled"]))
            case "abort":
                self._engine.abort(message["request_id"])
                self._unfinished.discard(message["request_id"])
            case "state":
                self._engine.check()
                self._channel.send({"type": "state", "unfinished": len(self._unfinished)})
            case "figures":
                self._channel.send({"type": "figures", "figures": self._engine.figures()})
            case unknown:
                raise AssertionError(f"no such message: {unknown!r}")

    def _add(self, message: Message) -> None:
        request_id = message["request_id"]
        sampling = unpack_sampling(message["sampling"])
        try:
            self._engine.add(
                list(message["prompt_ids"]),
                sampling,
                request_id=request_id,
                owner=message.get("owner", ""),
                priority=message.get("priority", 0),
            )
        except ValueError as error:
            self._channel.send({"type": "refused", "request_id": request_id, "message": str(error)})
        else:
            self._unfinished.add(request_id)
            self._channel.send({"type": "accepted", "request_id": request_id})


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.runtime.process", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited socket to the client")
    parser.add_argument("--parent", type=int, required=True, help="process id of the client")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # these reach the whole group; the client decides when the engine ends
    die_with_parent(options.parent)
    channel = Channel(socket.socket(fileno=options.fd))
    end = ender(channel)
    try:
        [message] = channel.receive(wait=True)
        try:
            engine, ready = load(message)
        except (ValueError, OSError) as error:
            channel.send({"type": "failed", "message": str(error)})
            return 1
        channel.send(ready)
        engine.on_rank_death(end)
        gc.collect()
        gc.freeze()  # what is there now stays, and no collection between two steps looks at it again
        Service(engine, channel).run()
    except (EOFError, ConnectionError):
        pass  # the client is gone: nobody is left to work for
    except ChildProcessError as error:
        end(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
