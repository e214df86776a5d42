"""`ingot bench cold`: from the start of a process to the first token of a workspace."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, ROOT, check_out, provenance, record
from benchmarks.subject import Subject, SubjectOptions, find_subject

if TYPE_CHECKING:
    from engine.config import EngineConfig

ABOUT = """
Starts a new Python process that loads a workspace as the server does and draws one token, `repeats` times; a row has
the medians: the whole time, and its parts (interpreter and torch; verifying and loading; the first token). With
verify=true every byte is hashed on the way. A shape is written into a temporary folder first. cache=warm reads all
files once before, so that they are in the page cache; cache=dropped asks the system to forget them.
"""
SHOWN = (
    "model",
    "recipe",
    "gigabytes",
    "cache",
    "verify",
    "seconds",
    "import_seconds",
    "load_seconds",
    "token_seconds",
)
PROMPT_AND_ANSWER = 64
BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(SubjectOptions):
    repeats: int = option(3, "processes that are started; the row has the medians", least=1)
    verify: bool = option(True, "hash every byte against the manifest, as for an artifact that is served")
    cache: str = option("warm", "the system's page cache before each start", choices=("warm", "dropped"))
    max_batch_size: int = option(0, "of the engine; 0 is what the workspace says", least=0)
    out: Path = option(RESULTS / "cold.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench cold", about=ABOUT)
    check_out(options.out)
    subject = find_subject(options)
    with workspace_of(subject) as (folder, artifact_id):
        if options.verify and artifact_id is None:
            raise ValueError(f"{folder} has no manifest, so nothing can be verified: say verify=false.")
        from engine.config import EngineConfig

        config = EngineConfig(
            device=subject.device,
            dtype=str(subject.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # one of Dtype
            session_len=PROMPT_AND_ANSWER if subject.device == "cpu" else 0,
            max_batch_size=options.max_batch_size,
            tp=subject.tp,
        )
        phases = []
        for _ in range(options.repeats):
            size = prepare(folder, dropped=options.cache == "dropped")
            phases.append(start(folder, config, verify=options.verify, artifact_id=artifact_id))
    medians = {name: round(statistics.median(phase[name] for phase in phases), 3) for name in phases[0]}
    row = {
        **provenance(subject.device),
        "engine": "ingot",
        **subject.columns,
        "artifact": (artifact_id or "")[:12],
        "gigabytes": round(size / 1e9, 3),
        "cache": options.cache,
        "verify": str(options.verify).lower(),
        "repeats": options.repeats,
        **medians,
    }
    record(options.out, row, SHOWN)
    return 0


@contextmanager
def workspace_of(subject: Subject) -> Iterator[tuple[Path, str | None]]:
    """The folder of what is measured and its artifact id; a shape's is written for the time of the measurement."""
    if subject.folder is not None:
        yield subject.folder, subject.artifact_id
        return
    from benchmarks.random_workspace import write_workspace

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / subject.name
        yield (
            folder,
            write_workspace(folder, subject.name, subject.config, subject.recipe, tp=subject.tp, seed=subject.seed),
        )


def prepare(folder: Path, *, dropped: bool) -> int:
    """Bring all files into the page cache, or have the system drop them from it; returns their bytes."""
    size = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb", buffering=0) as file:
            if dropped:
                os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(BLOCK):
                    pass
            size += os.fstat(file.fileno()).st_size
    return size


def start(folder: Path, config: EngineConfig, *, verify: bool, artifact_id: str | None) -> dict[str, float]:
    """Seconds of one process, whole and in its parts; ValueError, in its words, where it fails."""
    job = {"folder": str(folder), "config": asdict(config), "verify": verify, "artifact_id": artifact_id}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", "-m", "benchmarks.cold_start", json.dumps(job)]
    begun = time.monotonic()
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"the process that loads {folder} failed: {last[0].removeprefix('ValueError: ')}")
    ended = json.loads(answer.stdout.splitlines()[-1])
    return {
        "seconds": ended["answered"] - begun,
        "import_seconds": ended["imported"] - begun,
        "load_seconds": ended["loaded"] - ended["imported"],
        "token_seconds": ended["answered"] - ended["loaded"],
    }
