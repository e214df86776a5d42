"""What every stage does besides its work: read the slice, find the sources, write whole outputs, die with its parent.

A stage is `python -m pipelines.<stage> --slice FILE --out PATH [--in NAME=PATH ...] [--device cuda]`:

    def work(call: Call) -> None:
        checkpoint = locate(call.slice["model"])
        with output(call.out) as folder:
            ...

    if __name__ == "__main__":
        raise SystemExit(run_stage(work))

Inputs are named after the stage that made them: `call.inputs["calibrate"]`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import sources, toolchain

PATHS = Path("build/paths.json")
MEMORY = Path(".ingot/sources.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One run of a stage: the slice's content, the output's path, the inputs by name, and where to compute."""

    slice: dict[str, Any]
    out: Path
    inputs: dict[str, Path]
    device: str = "cpu"


def run_stage(work: Callable[[Call], None], argv: Sequence[str] | None = None, *, on_gpus: bool = False) -> int:
    """Parse the stage's command line and do its work. A ValueError or OSError becomes one paragraph and exit code 1.

    `on_gpus`: the stage computes on a GPU as well, where it is asked to; any other refuses to be asked.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {_module(work)}", allow_abbrev=False)
    parser.add_argument("--slice", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--in", dest="inputs", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N" if on_gpus else "cpu alone")
    arguments = parser.parse_args(argv)
    die_with_parent()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when a data set or a model is fetched
    try:
        inputs = dict(_named_input(text) for text in arguments.inputs)
        if arguments.device != "cpu" and not on_gpus:
            raise ValueError(f"--device {arguments.device}: this stage computes on the CPU alone. Leave --device out.")
        content = read_slice(arguments.slice)
        if "toolchain" in content:
            declared = dict(content["toolchain"])
            if arguments.device != "cpu":
                declared.pop("device")  # another device was asked for than the one that the slice was made on
            toolchain.check_toolchain(declared)
            toolchain.fix_instruction_set(content["toolchain"]["device"])
        work(Call(slice=content, out=arguments.out, inputs=inputs, device=arguments.device))
    except (ValueError, OSError) as error:
        print(f"{arguments.slice.parent.name} {arguments.slice.stem}: {error}", file=sys.stderr)
        return 1
    return 0


def read_slice(path: Path) -> dict[str, Any]:
    """The slice's content. FileNotFoundError or ValueError when compose has not written it whole."""
    if not path.is_file():
        raise FileNotFoundError(f"The slice {path} does not exist. `dvc repro compose` writes the slices.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The slice {path} is not JSON ({error}). `dvc repro compose` writes it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"The slice {path} is not a JSON object. `dvc repro compose` writes it again.")
    return content


def locate(record: Mapping[str, Any], *, paths: Path = PATHS, memory: Path = MEMORY) -> Path:
    """Where a source record's content lies on this machine, its digest checked; a hub repository is fetched if absent.

    The answer is a folder for a checkpoint, a file or folder for texts and data sets.
    FileNotFoundError when it is not here, ValueError when it is not what the slice was made for.
    """
    key = sources.identity(record)
    known = json.loads(paths.read_text(encoding="utf-8")) if paths.is_file() else {}
    if record["kind"] == "hub":
        from pipelines.hub import fetch

        return fetch(record["repo"], record["revision"], local=known.get(key), allow_bin=sources.pickled(record))
    if key not in known:
        raise FileNotFoundError(
            f"The source {key} is not on this machine, and what is to be built needs it. Set the path of its entry in"
            " conf/ to where a copy lies, then run `dvc repro` again."
        )
    path = Path(known[key])
    if "digest" not in record:
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path}, which compose found, is gone. Put it back, then run `dvc repro` again.")
    remembered = sources.Memory(memory)
    found = sources.measure(record, path, remembered.sha256)
    if found != record["digest"]:
        raise ValueError(
            f"{path} changed since the slices were written: SHA-256 {found}, not {record['digest']}."
            " Run `dvc repro` again so that compose sees the change."
        )
    return path


@contextmanager
def output(path: Path) -> Iterator[Path]:
    """A new empty folder beside `path` that takes its place, flushed to disk, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(Path(folder) / name)
            _flush(Path(folder))
        _remove(path)
        temporary.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON with sorted keys, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(temporary)
    if path.is_dir():
        _remove(path)
    temporary.replace(path)


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` without new bytes; a copy where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def die_with_parent() -> None:
    """End this process by SIGKILL as soon as the one that started it ends (Linux; elsewhere nothing is done)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def _module(work: Callable[[Call], None]) -> str:
    """The name that a stage was started by: run with `python -m` its module calls itself __main__."""
    spec = getattr(sys.modules.get(work.__module__), "__spec__", None)
    return spec.name if spec is not None else work.__module__


def _named_input(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ValueError(f"--in {text!r} is not NAME=PATH.")
    return name, Path(path)


def _sweep(path: Path) -> None:
    """Remove what writers of `path` left behind that were killed."""
    for left in path.parent.glob(f"{path.name}.tmp-*"):
        process = left.name.rpartition("-")[2]
        if process.isdigit() and (not Path(f"/proc/{process}").exists() or int(process) == os.getpid()):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
