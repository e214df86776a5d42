"""A process of its own for code that reads damaged files: bounded memory, a deadline, and a crash that is an answer.

`python -m tests.confined` answers, for each folder and function on a line of its input, what the function did there.
A case that is no clear error in bounds is kept as a folder.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What reading a file may take beside the file's own size, and for how long.
ALLOWED_BYTES = 64 << 20
ALLOWED_SECONDS = 5.0
# A process that other work keeps from running is not a hang; its own time is counted apart.
PATIENCE_SECONDS = 20.0
LONGEST_MESSAGE = 2000


class Confined:
    """One such process, started when it is needed and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(tempfile.mkstemp(prefix="ingot-confined-")[1])

    def ask(self, door: str, folder: Path, *, bounded: bool) -> dict[str, Any]:
        """What `door`, a function `module:name`, does with a folder."""
        if self._process is None:
            self._process = self._start()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps({"door": door, "folder": str(folder), "bounded": bounded}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return self._ended("the process was dead")
        ready, _, _ = select.select([stdout], [], [], PATIENCE_SECONDS)
        if not ready:
            return self._ended(f"no answer in {PATIENCE_SECONDS:g} s")
        line = stdout.readline()
        answered: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else self._ended("the process died")
        return answered

    def close(self) -> None:
        if self._process is not None:
            self._ended("")
        self._log.unlink()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.confined"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment,
            )

    def _ended(self, what: str) -> dict[str, Any]:
        process, self._process = self._process, None
        assert process is not None and process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            code = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        said = self._log.read_text(errors="replace")[-2000:]
        return {"outcome": "ended", "text": f"{what}, exit code {code}; it said: {said}"}


class DamagedFolder:
    """A folder of valid files, of which some are replaced for one look through its door."""

    def __init__(self, confined: Confined, door: str, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self._confined = confined
        self._door = door
        self._folder = Path(tempfile.mkdtemp(prefix="ingot-damaged-"))
        self._changed = set(files)
        for bounded in (False, True):  # libraries are loaded, and threads started, without bounds
            outcome = self._outcome({}, bounded=bounded)
            assert outcome == {"outcome": "taken"}, f"the files are not valid as they are: {outcome}"

    def check(self, damaged: Mapping[str, bytes | None]) -> str:
        """`taken` or `refused`; AssertionError, with a copy of the folder kept, for what is no clear error in bounds.

        `damaged` replaces files; None takes one away.
        """
        outcome = self._outcome(damaged)
        problem = self._problem(outcome)
        if problem is not None:
            kept = Path(tempfile.mkdtemp(prefix="ingot-damage-found-")) / "case"
            shutil.copytree(self._folder, kept)
            raise AssertionError(f"{problem}\nThe damaged files ({', '.join(damaged)}) are kept in {kept}.")
        return str(outcome["outcome"])

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def _outcome(self, damaged: Mapping[str, bytes | None], *, bounded: bool = True) -> dict[str, Any]:
        for name in self._changed | set(damaged):
            content = damaged[name] if name in damaged else self.files.get(name)
            path = self._folder / name
            path.unlink(missing_ok=True)  # an open mapping of the last case keeps its own file
            if content is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        self._changed = set(damaged)
        return self._confined.ask(self._door, self._folder, bounded=bounded)

    def _problem(self, outcome: Mapping[str, Any]) -> str | None:
        text = outcome.get("text", "")
        if outcome["outcome"] not in ("taken", "refused"):
            return f"{outcome['outcome']}: {text}"
        if outcome["outcome"] == "refused" and str(self._folder) not in text:
            return f"the error does not say which file it is about: {text}"
        if len(text) > LONGEST_MESSAGE:
            return f"the error is no paragraph but {len(text)} characters: {text[:300]}..."
        if outcome.get("seconds", 0.0) > ALLOWED_SECONDS:
            return f"it took {outcome['seconds']:.1f} s: {outcome}"
        return None


def answer(door: Callable[[Path], None], folder: Path, *, bounded: bool) -> dict[str, Any]:
    """What `door` does with a folder; `bounded`: in no more memory than its files' size and ALLOWED_BYTES more."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    status = Path("/proc/self/status").read_text()
    taken = int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    start = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (taken + size + ALLOWED_BYTES if bounded else soft, hard))
        door(folder)
        told: dict[str, Any] = {"outcome": "taken"}
    except BaseException as error:
        ours = isinstance(error, ValueError | OSError) and type(error).__module__.split(".")[0] in (
            "builtins",
            "engine",
        )
        if ours and not isinstance(error, UnicodeError):
            told = {"outcome": "refused", "text": str(error)}
        else:
            told = {"outcome": "escaped", "text": traceback.format_exc()[-3000:]}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    seconds = time.process_time() - start
    return told | ({"seconds": seconds} if bounded and seconds > ALLOWED_SECONDS else {})


def main() -> None:
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
        for line in sys.stdin:
            asked = json.loads(line)
            module, _, name = asked["door"].partition(":")
            door = getattr(importlib.import_module(module), name)
            answers.write(json.dumps(answer(door, Path(asked["folder"]), bounded=asked["bounded"])) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
