"""The model repository of Triton Inference Server in a workspace: three models of its Python backend. Torch-free.

In an artifact they are regular files, in both places that the reference has them; `link_repository` makes one place the
reference's links. Their parameters name weights and tokenizer relative to the model's folder, alike from both places.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from engine.storage.artifacts import MANIFEST, SHORT, ArtifactError, hash_files, list_files, read_manifest
from engine.storage.config_ini import read_config_ini

TEMPLATES = Path(__file__).parent / "triton_models"
# Named one by one: Python may have left other files beside them.
FILES = ("config.pbtxt", "1/model.py")
MODELS = {"turbomind": "interactive", "preprocessing": "preprocessing", "postprocessing": "postprocessing"}
REPOSITORY_LINKS = {f"model_repository/{model}": f"../triton_models/{folder}" for model, folder in MODELS.items()}
LINKS = REPOSITORY_LINKS | {
    "triton_models/interactive/1/weights": "../../weights",
    "triton_models/preprocessing/1/tokenizer": "../../tokenizer",
    "triton_models/postprocessing/1/tokenizer": "../../tokenizer",
}
READ_BY_THE_ENGINE = ("triton_models/weights", "triton_models/tokenizer")


def repository_files(*, model_name: str, tp: int) -> dict[str, bytes]:
    """Path in the workspace -> content. `tp` and `model_name` are appended to the engine's parameters."""
    appended = "".join(
        # JSON's escapes are those of protobuf's text format.
        f'parameters {{\n  key: "{key}"\n  value: {{ string_value: {json.dumps(value, ensure_ascii=False)} }}\n}}\n'
        for key, value in (("tensor_para_size", str(tp)), ("model_name", model_name))
    )
    found = {}
    for model, folder in MODELS.items():
        for name in FILES:
            content = (TEMPLATES / folder / name).read_bytes()
            if (folder, name) == ("interactive", "config.pbtxt"):
                content += appended.encode()
            found[f"triton_models/{folder}/{name}"] = found[f"model_repository/{model}/{name}"] = content
    return found


def write_repository(workspace: Path, *, model_name: str, tp: int) -> None:
    for name, content in repository_files(model_name=model_name, tp=tp).items():
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never written in place: a file that is there may be a hard link to something that must not change.
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def link_repository(workspace: Path) -> None:
    """Put the reference's links into a copy of a workspace; the copies that they stand for are removed."""
    for name, target in LINKS.items():
        path = workspace / name
        if (path.parent / target).is_dir() and not path.is_symlink():
            if path.is_dir():
                shutil.rmtree(path)
            path.symlink_to(target, target_is_directory=True)


def verify_deployed(workspace: Path, *, model_name: str, tp: int) -> str | None:
    """Hash everything that the engine reads, and return the artifact's id; None for a workspace without manifest.

    Triton's own files are not looked at: its links and its configuration are the operator's. ArtifactError names
    every damaged, missing or extra file; `model_name` and `tp` must be config.ini's.
    """
    ini = read_config_ini(workspace / READ_BY_THE_ENGINE[0] / "config.ini")
    if (ini.model_name, ini.tensor_para_size) != (model_name, tp):
        raise ArtifactError(
            f"config.pbtxt says model_name {model_name!r} and tensor_para_size {tp}, config.ini of {workspace} "
            f"{ini.model_name!r} and {ini.tensor_para_size}: they belong to different workspaces"
        )
    if not (workspace / MANIFEST).is_file():
        return None
    manifest = read_manifest(workspace)
    folders = tuple(f"{folder}/" for folder in READ_BY_THE_ENGINE)
    expected = {entry.path: entry for entry in manifest.files if entry.path.startswith(folders)}
    problems: list[str] = []
    found: set[str] = set()
    for folder in folders:
        files, refused = list_files(workspace / folder)
        found |= {folder + name for name in files}
        problems += [folder + problem for problem in refused]
    problems += [f"{path} is missing" for path in expected.keys() - found]
    problems += [f"{path} is not in the manifest" for path in found - expected.keys()]
    digests = hash_files(workspace, found & expected.keys())
    problems += [f"{path} has changed" for path, (sha256, _) in digests.items() if sha256 != expected[path].sha256]
    if problems:
        raise ArtifactError(f"artifact {manifest.id[:SHORT]} in {workspace} is damaged: {'; '.join(sorted(problems))}.")
    return manifest.id
