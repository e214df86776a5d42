"""A tensor-parallel rank beside rank 0: `python -m engine.runtime.rank_process --fd N`, started by rank_processes.py.

In comes what it is to do; `loaded` goes out when its share of the weights is there, and `failed` where it cannot go on.
Then every `step` of rank 0 comes in, until `end`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.models import ranks
from engine.runtime.batch import Step
from engine.runtime.channel import Channel, Message
from engine.runtime.prepare import prepare
from engine.runtime.share import Share, check_share, share_of_workspace
from engine.storage.workspace import Workspace

Work = Callable[[Message, Channel], None]


def run(work: Work) -> int:
    """Do `work(task, channel)` as the process of a rank, whose end is rank 0's, and return the exit code."""
    parser = argparse.ArgumentParser(prog="engine.runtime.rank_process", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited socket to rank 0")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # these reach the whole group; rank 0 decides when it ends
    connection = socket.socket(fileno=options.fd)
    threading.Thread(target=_leave_with, args=(connection,), daemon=True).start()
    channel = Channel(connection)
    try:
        [task] = channel.receive(wait=True)
        torch.set_num_threads(task["threads"])
        work(task, channel)
    except (EOFError, ConnectionError):
        return 1  # rank 0 is gone
    except Exception as error:
        mistake = isinstance(error, ValueError | OSError)
        said = {"message": str(error), "trace": ""}
        if not mistake:
            said = {"message": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        with contextlib.suppress(OSError):
            channel.send({"type": "failed", **said})
        return 1
    os._exit(0)  # nothing is left to be tidied, which takes a second


def meet(task: Message, device: torch.device) -> None:
    """Join the group of rank 0, which waits for all to do so."""
    rank, size = task["rank"], task["size"]
    ranks.join(ranks.find_store(task["port"], size), rank, size, device)


def follow(task: Message, channel: Channel, share: Share, config: EngineConfig) -> None:
    """Compute what rank 0 launches over this rank's share of a model, until it ends. `config` is rank 0's, and all that
    it leaves open is open there."""
    channel.send({"type": "loaded"})
    meet(task, share.model.device)
    made = prepare(
        share.model,
        config.complete(),
        session_len=config.session_len,
        kv_scales=share.kv_scales,
        eos_token_ids=(),
    )
    while True:
        for message in channel.receive(wait=True):
            if message.pop("type") == "end":
                made.runner.release()
                if message["leave"]:
                    ranks.leave()
                return
            made.runner.follow(Step.of_message(message))


def work_on_workspace(task: Message, channel: Channel) -> None:
    config, workspace, rank = EngineConfig(**task["config"]), Workspace(Path(task["folder"])), task["rank"]
    check_share(workspace, config, rank)
    follow(task, channel, share_of_workspace(workspace, config, rank), config)


def _leave_with(connection: socket.socket) -> None:
    """End this process as soon as rank 0's end of the connection is closed, whatever it computes."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP if sys.platform == "linux" else select.POLLHUP)
    poll.poll()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run(work_on_workspace))
