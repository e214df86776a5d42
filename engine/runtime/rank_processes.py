"""The processes of the other tensor-parallel ranks, as rank 0 has them: started, told of steps, watched, ended."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from engine.models import ranks
from engine.runtime.channel import Channel, Message

PACKAGES = str(Path(__file__).resolve().parents[2])
# The module of a rank of an engine: one that reads its share of a workspace.
ENGINE_RANK = "engine.runtime.rank_process"
SECONDS_TO_END = 5.0
# From the first sign of trouble until it is said whose it is: the others fail on a dead one, and may be heard first.
SECONDS_TO_BLAME = 0.3
# How long an error of ours waits to be told as that of the rank that caused it, and how long a process that is stuck in
# its device, or reads weights, lives after the death of another rank.
SECONDS_TO_LEARN = 2.0
SECONDS_TO_NOTICE = 3.0


class RankError(ChildProcessError):
    """A rank has died or failed, and the others cannot go on without it: the engine has ended."""


class RankProcesses:
    """Ranks 1 to `size` - 1 on this machine, each a process of `module` with a socket pair; see `rank_process.run`.

    They end with this process, whatever happens, and with this object.
    """

    def __init__(self, size: int, task: Message, *, module: str = ENGINE_RANK) -> None:
        """Starts them on `task`, which they get with `rank`, `size`, `port` and `threads`."""
        if ranks.joined():
            gc.collect()  # an engine that nobody has any more
        if ranks.joined():
            raise ValueError(
                f"tp={size}: this process has an engine of several ranks already, and can have one at a time. Close it "
                "first."
            )
        self.size = size
        self.store = ranks.open_store(size)
        self._watch = _Watch(size)
        threads = max(torch.get_num_threads() // size, 1)
        for rank in range(1, size):
            self._watch.add(rank, module)
        for rank, channel in self._watch.channels.items():
            about = {"rank": rank, "size": size, "port": self.store.port, "threads": threads}
            with contextlib.suppress(OSError):  # one that is gone already is told of by its watch
                channel.send({**task, **about})
        self._end = weakref.finalize(self, _end, self._watch, torch.get_num_threads())
        torch.set_num_threads(threads)

    def close(self) -> None:
        """End them; CUDA graphs of this rank must be gone."""
        self._watch.released = True
        self._end()

    @property
    def process_ids(self) -> list[int]:
        return [process.pid for process in self._watch.processes.values()]

    def wait_for(self, word: str) -> None:
        """Return when every rank has said `word`. RankError where one cannot."""
        self._watch.loading = False
        with self.together():
            for _ in self._watch.processes:
                said = self._watch.said.get()
                if said is None:
                    raise self._watch.blame()
                assert said["type"] == word, said

    def tell(self, message: Message) -> None:
        """Send a message to every rank."""
        for channel in self._watch.channels.values():
            channel.send(message)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do together. An error in it ends all ranks, and is a RankError that says which of them
        is to blame."""
        watch = self._watch
        if watch.error is not None:
            raise watch.error
        watch.inside += 1
        try:
            yield
        except Exception as error:
            raise watch.caused_by(error) from error
        except BaseException as error:  # an interrupt: the others are in the middle of a step
            watch.caused_by(error, patience=0)
            raise
        finally:
            watch.inside -= 1

    def on_death(self, call: Callable[[RankError], None]) -> None:
        """What is called, in a thread of its own, as soon as a rank has died or failed."""
        self._watch.on_death = call
        if self._watch.error is not None:
            call(self._watch.error)


@contextlib.contextmanager
def ended_by_errors(others: RankProcesses | None) -> Iterator[None]:
    """Around what makes an engine of them: an error in it ends the processes."""
    try:
        yield
    except BaseException:
        if others is not None:
            others.close()
        raise


class _Watch:
    """What the threads that watch the processes know. It outlives the object, whose end it must not prevent."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.channels: dict[int, Channel] = {}
        self.said: queue.Queue[Message | None] = queue.Queue()
        self.error: RankError | None = None
        self.on_death: Callable[[RankError], None] | None = None
        self.closing = self.released = False
        self.loading = True
        self.inside = 0
        self._failures: dict[int, Message] = {}
        self._lock = threading.Lock()
        self._known = threading.Event()

    def add(self, rank: int, module: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])},
            )
        self.channels[rank] = Channel(ours)
        threading.Thread(target=self._listen, args=(rank,), name=f"rank {rank}", daemon=True).start()

    def _listen(self, rank: int) -> None:
        """Hear what a rank says until it ends."""
        try:
            while True:
                for message in self.channels[rank].receive(wait=True):
                    if message["type"] == "failed":
                        self._failures[rank] = message
                        self._trouble()
                    else:
                        self.said.put(message)
        except (EOFError, OSError):
            self._trouble()

    def _trouble(self) -> None:
        """Find out whose it is, end all, and say so."""
        with self._lock:
            if self.closing or self.error is not None:
                return
            time.sleep(SECONDS_TO_BLAME)
            self._settle(RankError(self._culprit()))
        assert self.error is not None
        if self.on_death is not None:
            self.on_death(self.error)
        time.sleep(SECONDS_TO_NOTICE)
        if (self.inside or self.loading) and not self.closing:
            # In a collective of a device, which waits for a rank that will not come, or reading its weights.
            sys.stderr.write(f"ingot: {self.error}\n")
            os._exit(1)

    def _culprit(self) -> str:
        ended = {rank: process.poll() for rank, process in self.processes.items()}
        killed = next(((rank, code) for rank, code in ended.items() if code is not None and code < 0), None)
        if killed is not None:
            rank, how = killed[0], f"was killed by {signal.Signals(-killed[1]).name}"
        elif self._failures:
            rank, said = next(iter(self._failures.items()))
            sys.stderr.write(said["trace"])
            how = f"failed: {said['message']}"
        else:
            rank, code = next(((rank, code) for rank, code in ended.items() if code is not None), (0, None))
            how = f"ended with exit code {code}"
        process = f"process {self.processes[rank].pid}" if rank else "this process"
        return f"Rank {rank} of the {self.size} tensor-parallel ranks ({process}) {how}. The engine has ended."

    def _settle(self, error: RankError) -> None:
        self.error = error
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
        self.said.put(None)
        self._known.set()
        threading.Thread(target=ranks.abort, name="abort", daemon=True).start()

    def blame(self) -> RankError:
        assert self.error is not None
        return self.error

    def caused_by(self, error: BaseException, patience: float = SECONDS_TO_LEARN) -> RankError:
        """The error that ended a step here, as that of the rank which caused it: this one where no other did."""
        if isinstance(error, RankError):
            return error
        if not self._known.wait(patience):
            with self._lock:
                if self.error is None:
                    what = f"{type(error).__name__}: {error}".removesuffix(": ")
                    self._settle(
                        RankError(
                            f"Rank 0 of the {self.size} tensor-parallel ranks (this process) failed: {what}. The "
                            "engine has ended."
                        )
                    )
        return self.blame()


def _end(watch: _Watch, threads: int) -> None:
    """End all ranks, which leave the group together with this one where it can be left: else it ends with them."""
    watch.closing = True
    torch.set_num_threads(threads)
    whole = watch.error is None and ranks.joined()
    leaving = not ranks.on_gpus() or (whole and watch.released)
    for rank, channel in watch.channels.items():
        if whole:
            with contextlib.suppress(OSError):
                channel.send({"type": "end", "leave": leaving})
        else:
            watch.processes[rank].kill()
    if leaving:
        ranks.leave()
    if watch.error is None:
        watch.error = RankError("the engine was closed")
    before = time.monotonic()
    for process in watch.processes.values():
        try:
            process.wait(max(before + SECONDS_TO_END - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for channel in watch.channels.values():
        channel.close()
