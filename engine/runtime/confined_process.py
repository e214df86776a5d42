"""A module of ours in a process with limits, which it sets itself: JSON lines go in, and one comes out for each."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.wording import cut

PACKAGES = str(Path(__file__).resolve().parents[2])


class ConfinedProcess:
    """Started by `start`, or by the first question, with the line `first`; started again where it was ended; and ended
    with this object. Calls from several threads take turns. ValueError, beginning with `refused`, where the process
    does not accept its first line, and `ended` where a question was the end of it."""

    def __init__(self, module: str, first: Mapping[str, Any], *, refused: str, ended: str) -> None:
        self._module, self._first = module, first
        self._refused, self._ended = refused, ended
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        with self._lock:
            self._start()

    def ask(self, question: Mapping[str, Any]) -> dict[str, str]:
        """What the process says to `question`: `text`, or `error`."""
        with self._lock:
            if self.process_id is None:
                self._start()
            return self._answer(question)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        # -P and PYTHONPATH: the same package as here, whatever lies in the working directory.
        path = os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._end = weakref.finalize(self, _end, self._process)
        answer = self._answer(self._first)
        if "error" in answer:
            raise ValueError(f"{self._refused}: {cut(answer['error'])}")

    def _answer(self, question: Mapping[str, Any]) -> dict[str, str]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the answer that does not come says as well
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._end()
            raise ValueError(self._ended)
        answer: dict[str, str] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what it did not read any more
            if stream is not None:
                stream.close()
