"""The engine of a workspace that another server runs: checked, with the options of that server's configuration."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.runtime.engine import Engine
from engine.storage.triton_repository import verify_deployed


def open_deployed(workspace: Path, options: str, *, model_name: str, tp: int) -> tuple[Engine, str | None]:
    """The engine and the artifact's id, None for a folder without a manifest.

    `options` is a JSON object of EngineConfig's fields; what it leaves open config.ini says, and without a device a GPU
    is taken where there is one.
    `model_name` and `tp` must be config.ini's. ArtifactError or ValueError for a damaged folder or a wrong option.
    """
    config = deployed_config(options)
    artifact_id = verify_deployed(workspace, model_name=model_name, tp=tp)
    return Engine.from_workspace(workspace, config), artifact_id


def deployed_config(options: str) -> EngineConfig:
    try:
        content = json.loads(options)
    except ValueError:
        content = None
    known = [each.name for each in fields(EngineConfig)]
    if not isinstance(content, dict) or set(content) - set(known):
        raise ValueError(f"The engine's options are {options}, but must be a JSON object of: {', '.join(known)}.")
    return EngineConfig(**{"device": "cuda" if torch.cuda.is_available() else "cpu", **content})
