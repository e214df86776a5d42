"""The project's folder: where it is, how it is copied for a job of its own, and `dvc` run in it."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipelines import slices
from pipelines.mend import mend

JOBS = Path(".ingot/jobs")
"""Where the copies are that jobs work in, named `job-<process>-...`."""
NOT_COPIED = {".git", ".venv", "build", "store", "outputs", "multirun", "__pycache__", ".ingot"}
NOT_COPIED_OF_DVC = {"cache", "tmp", "config.local"}


def project_root() -> Path:
    """The current folder if it is a project (dvc.yaml and conf/), else the checkout that this program came from."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (folder / "dvc.yaml").is_file() and (folder / "conf/config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"{Path.cwd()} is not a project: dvc.yaml and conf/ are not there. Change to its folder.")


def cache_folder(root: Path) -> Path:
    """Where DVC keeps the cache of this project, from its configuration files in their order of rank."""
    repository = root / ".dvc"
    folders = [
        Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR", "/etc/xdg/dvc")) / "config",
        Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR", Path.home() / ".config/dvc")) / "config",
        repository / "config",
        repository / "config.local",
    ]
    found = repository / "cache"
    for path in folders:
        if path.is_file():
            parser = configparser.ConfigParser(interpolation=None, strict=False)
            parser.read_string("\n".join(line.strip() for line in path.read_text(encoding="utf-8").splitlines()))
            if value := parser.get("cache", "dir", fallback="").strip("\"'"):
                found = path.parent / value
    return found.resolve()


def run_dvc(root: Path, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None) -> int:
    """Run dvc in a folder, its output on our standard error, and return its exit code. It ends when we do.

    The stages run with this very interpreter. What an earlier dvc left half-written is put away first, and said.
    """
    for said in mend(root):
        print(said, file=sys.stderr)
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env={**os.environ, "PATH": search_path, "DVC_NO_ANALYTICS": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        preexec_fn=slices.die_with_parent,
    )
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def tracked_files(root: Path) -> list[str] | None:
    """What git knows or would add, relative to `root`; None where there is no git."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sorted({os.fsdecode(name) for name in done.stdout.split(b"\0") if name})


def copy_tree(root: Path, target: Path) -> bool:
    """Copy the project as it lies in `root`, not as it was committed. False where there was no git to ask, and
    everything was copied but what a build, an environment or a cache made."""
    names = tracked_files(root)
    if names is None:
        shutil.copytree(root, target, ignore=_ignored(root), dirs_exist_ok=True)
        return False
    for name in names:
        source = root / name
        if source.is_file():  # git also names what was deleted, and folders of submodules
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return True


def isolate(root: Path, target: Path) -> bool:
    """Copy the project and join the copy to the cache of the original. Says whether git knew the files."""
    by_git = copy_tree(root, target)
    memory = root / slices.MEMORY
    if memory.is_file():
        (target / slices.MEMORY).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(memory, target / slices.MEMORY)
    settings = f"[core]\n    no_scm = true\n[cache]\n    dir = {cache_folder(root)}\n"
    (target / ".dvc").mkdir(exist_ok=True)
    (target / ".dvc/config.local").write_text(settings, encoding="utf-8")
    return by_git


def _ignored(root: Path) -> Callable[[str, list[str]], set[str]]:
    def names(folder: str, content: list[str]) -> set[str]:
        if Path(folder) == root / ".dvc":
            return NOT_COPIED_OF_DVC & set(content)
        top = NOT_COPIED if Path(folder) == root else {"__pycache__"}
        return (top & set(content)) | {name for name in content if name.endswith(".egg-info")}

    return names
