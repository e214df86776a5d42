"""Compiles grammars in a process with limits, for a server that must outlive any grammar."""

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

from engine.config import Grammar
from engine.wording import cut

SECONDS = 10
# xgrammar, torch and a vocabulary of 150,000 tokens take 1.5 GiB of addresses, half of it never touched.
MEMORY_BYTES = 4 << 30
LARGEST = 32 << 20
PACKAGES = str(Path(__file__).resolve().parents[2])


class GrammarCompiler:
    """For one tokenizer folder. The process starts with the first grammar, which takes seconds, and lives as long as
    this object. Calls from several threads take turns."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._first = {"folder": str(folder), "vocab_size": vocab_size, "eos_token_ids": list(eos_token_ids)}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, grammar: Grammar) -> Grammar:
        """The grammar as kind `compiled`. ValueError where it is not valid, or takes more than SECONDS of computing or
        MEMORY_BYTES."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._answer({"kind": grammar.kind, "text": grammar.text})
        if "error" in answer:
            raise ValueError(cut(answer["error"], 1000))
        if len(answer["text"]) > LARGEST:
            raise ValueError(
                f"the grammar is too large: compiled it has {len(answer['text'])} bytes, of {LARGEST} allowed"
            )
        return Grammar(kind="compiled", text=answer["text"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        # -P and PYTHONPATH: the same package as here, whatever lies in the working directory.
        path = os.pathsep.join([PACKAGES, os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.runtime.grammar_sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._end = weakref.finalize(self, _end, self._process)
        answer = self._answer(self._first)
        if "error" in answer:
            raise ValueError(f"grammars cannot be compiled here: {cut(answer['error'])}")

    def _answer(self, asked: Mapping[str, Any]) -> dict[str, str]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the answer that does not come says as well
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._end()
            raise ValueError(
                f"the grammar is too large: compiling it may take {SECONDS} s of computing and "
                f"{MEMORY_BYTES >> 20} MiB, and takes more"
            )
        answer: dict[str, str] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what it did not read any more
            if stream is not None:
                stream.close()
