"""What a command is to run: an artifact of the store that may be served, or a plain folder that nobody verified."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from cli.checkout import open_store
from engine.storage.artifacts import read_manifest
from server.config import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A workspace folder and what is known about it. Only an artifact is verified when it is loaded."""

    folder: Path
    model: ServedModel

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "triton_models" / "tokenizer"


def find_target(
    *, artifact: str | None, folder: str | None, waiver: str | None, store: str | None, model_name: str | None = None
) -> Target:
    """The artifact (id, unique prefix or name) or the folder; ValueError when it is not there or may not be served."""
    if (artifact is None) == (folder is None):
        raise ValueError(
            "say what to run: artifact=ID (an id, a unique prefix or a name) or folder=WORKSPACE, one of them."
        )
    if folder is not None:
        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise ValueError(f"folder={folder} is not a folder.")
        print(f"UNVERIFIED FOLDER {path}: its bytes and its quality were not checked", file=sys.stderr)
        return Target(folder=path, model=ServedModel(name=model_name or path.name, waiver=waiver))
    assert artifact is not None
    opened = open_store(store)
    artifact_id = opened.resolve(artifact)
    standing = opened.servable(artifact_id, waiver)
    path = opened.path(artifact_id)
    asked_name = artifact if artifact in opened.names() else artifact_id[:12]
    model = ServedModel(
        name=model_name or asked_name,
        artifact_id=artifact_id,
        recipe=str(read_manifest(path).recipe),
        verdict=standing["verdict"],
        waiver=standing["waiver"],
    )
    return Target(folder=path, model=model)
