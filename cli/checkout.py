"""The project that a command works on, and the store that its conf/config.yaml names."""

from __future__ import annotations

from pathlib import Path

import yaml

from engine.storage.store import Store
from pipelines.worktree import cache_folder, project_root


def open_store(path: str | None = None) -> Store:
    """The store at `path`, else the one of this project."""
    if path is not None:
        return Store(Path(path).expanduser())
    root = project_root()
    configured = yaml.safe_load((root / "conf/config.yaml").read_text(encoding="utf-8")).get("store", "store")
    return Store(root / configured)


def project_cache() -> Path:
    """The DVC cache that a new store shares with this project."""
    return cache_folder(project_root())


def conf_folder() -> Path:
    return project_root() / "conf"
