"""The C code of `c/`, compiled at first use and kept: which compiler and instructions, where the result lies, loading.

What is loaded runs as this process, so it comes from a folder that nobody else can write to, or from one that this
process made for itself. The file's name is a digest of the source, the compiler and its flags, among which are the
processor's instructions: a change of any of them compiles again. Files appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "c" / "linear.c"
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120
# Flags of the processor, as Linux names them, and what the compiler is told where all of them are there.
AVX2 = {"avx2", "fma", "f16c"}
VNNI = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}


class NotCompiled(Exception):
    """Why there are no compiled kernels in this process."""


def instruction_flags(cpu_flags: set[str], capability: str) -> tuple[str, ...]:
    """What the compiler is told of a processor, no more than `capability`, which is what torch keeps to."""
    if not cpu_flags >= AVX2 or capability not in ("AVX2", "AVX512"):
        return ()
    wide = capability == "AVX512" and cpu_flags >= VNNI
    names = sorted(AVX2 | VNNI if wide else AVX2)
    return (*(f"-m{name.replace('_', '')}" for name in names), *(("-mprefer-vector-width=256",) if wide else ()))


def library() -> ctypes.CDLL:
    """The compiled library; NotCompiled says why there is none."""
    command = _command()
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), *(word.encode() for word in command), _version(command)):
        key.update(hashlib.sha256(part).digest())
    name = f"linear-{key.hexdigest()[:32]}.so"
    folder = cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ingot-kernels-") as own:
            _compile(command, Path(own) / name)
            return _loaded(Path(own) / name)
    if _is_private(folder / name, stat.S_ISREG):
        with contextlib.suppress(NotCompiled):  # a disk that was full, or a damaged one
            return _loaded(folder / name)
    _compile(command, folder / name)
    return _loaded(folder / name)


def cache_folder() -> Path | None:
    """Where compiled files are kept, made if need be; None where no folder is there that others cannot write to."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "ingot" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
    except (OSError, RuntimeError):
        return None
    if not _is_private(folder, stat.S_ISDIR) or not os.access(folder, os.W_OK | os.X_OK):
        return None
    return folder if all(_cannot_be_swapped(parent) for parent in folder.parents) else None


def _is_private(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether it is there, of this kind and not a link, this user's own, and written to by nobody else."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _cannot_be_swapped(folder: Path) -> bool:
    """Whether others cannot replace what lies in a folder: it is this user's or root's, and not theirs to write, or
    sticky."""
    found = folder.stat()
    safe = not found.st_mode & 0o022 or bool(found.st_mode & stat.S_ISVTX)
    return safe and found.st_uid in (0, os.geteuid())


def _command() -> tuple[str, ...]:
    asked = shlex.split(os.environ.get("CC", ""))
    for words in [asked] if asked else [[name] for name in COMPILERS]:
        if path := shutil.which(words[0]):
            flags = instruction_flags(processor_flags(), torch.backends.cpu.get_cpu_capability())
            return (path, *words[1:], *FLAGS, *flags)
    raise NotCompiled(f"CC={asked[0]} is not there" if asked else f"no C compiler ({', '.join(COMPILERS)}) is there")


def processor_flags() -> set[str]:
    """The instructions of an x86 processor, as Linux names them; none where that is not known."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _version(command: tuple[str, ...]) -> bytes:
    return _run((command[0], "--version")).encode()


def _compile(command: tuple[str, ...], target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=target.parent) as own:
        made = Path(own) / target.name
        _run((*command, "-o", str(made), str(SOURCE)))
        made.chmod(0o700)
        made.replace(target)


def _run(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise NotCompiled(f"{command[0]} failed: {said}")
    return done.stdout


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotCompiled(f"{path} cannot be loaded: {error}") from error
