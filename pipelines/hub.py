"""A hub repository at one commit, in Hugging Face's cache folder: the files of a checkpoint and never code."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.sources import MODEL_FILES, PICKLED_FILES, model_files

# Weights that are there twice: Mistral's own format, and whatever lies in folders (Meta's, ONNX, ...).
NOT_FETCHED = ("consolidated*.safetensors", "*/*")
WEIGHTS = (".safetensors", ".bin", ".pth")


def cached(repo: str, revision: str, *, allow_bin: bool = False) -> Path | None:
    """The snapshot's folder when it is in the local cache with weights, else None. Opens no connection."""
    try:
        folder = _snapshot(repo, revision, allow_bin=allow_bin, local_files_only=True)
    except FileNotFoundError:
        return None
    return folder if any(path.suffix in WEIGHTS for path in model_files(folder, allow_bin=allow_bin)) else None


def fetch(repo: str, revision: str, *, local: str | None = None, allow_bin: bool = False) -> Path:
    """The snapshot's folder, downloaded when it is not in the cache. FileNotFoundError when it cannot be had.

    Pickled weights are fetched only with `allow_bin`.
    """
    if local and Path(local, "config.json").is_file():
        return Path(local)
    found = cached(repo, revision, allow_bin=allow_bin)
    return found or _snapshot(repo, revision, allow_bin=allow_bin, local_files_only=False)


def _snapshot(repo: str, revision: str, *, allow_bin: bool, local_files_only: bool) -> Path:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*MODEL_FILES, *(PICKLED_FILES if allow_bin else ())],
            ignore_patterns=list(NOT_FETCHED),
            local_files_only=local_files_only,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"The hub repository {repo} at {revision} is not in the local cache and could not be fetched"
            f" ({type(error).__name__}). Check the name, the revision and the connection, or give model.path."
        ) from error
    model_files(Path(folder), allow_bin=allow_bin)
    return Path(folder)
