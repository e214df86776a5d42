"""A hub repository at one commit, in Hugging Face's cache folder: the files of a checkpoint and never code."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.sources import MODEL_FILES, model_files


def cached(repo: str, revision: str) -> Path | None:
    """The snapshot's folder when it is in the local cache, else None. Opens no connection."""
    try:
        return _snapshot(repo, revision, local_files_only=True)
    except FileNotFoundError:
        return None


def fetch(repo: str, revision: str, *, local: str | None = None) -> Path:
    """The snapshot's folder, downloaded when it is not in the cache. FileNotFoundError when it cannot be had."""
    if local and Path(local, "config.json").is_file():
        return Path(local)
    return cached(repo, revision) or _snapshot(repo, revision, local_files_only=False)


def _snapshot(repo: str, revision: str, *, local_files_only: bool) -> Path:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(MODEL_FILES), local_files_only=local_files_only
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"The hub repository {repo} at {revision} is not in the local cache and could not be fetched"
            f" ({type(error).__name__}). Check the name, the revision and the connection, or give model.path."
        ) from error
    model_files(Path(folder))
    return Path(folder)
