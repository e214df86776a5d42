"""What a command is to run: an artifact of the store that may be served, or a plain folder that nobody verified."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.checkout import open_store
from engine.storage.artifacts import read_manifest
from pipelines.toolchain import device_class
from server.config import ServeConfig, ServedModel

if TYPE_CHECKING:
    from engine.runtime.tokenizer import Tokenizer

CONFIG_INI = Path("triton_models/weights/config.ini")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A workspace folder and what is known about it. Only an artifact is verified when it is loaded. `goldens` are the
    newest that an evaluation on this machine's class of processors recorded."""

    folder: Path
    model: ServedModel
    goldens: Path | None = None

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
        if not (path / CONFIG_INI).is_file():
            checkpoint = (path / "config.json").is_file() or (path / "params.json").is_file()
            advice = (
                f". It is a checkpoint: `ingot convert NAME {folder}` makes a workspace of it" if checkpoint else ""
            )
            raise ValueError(f"folder={folder} is no TurboMind workspace: it has no {CONFIG_INI}{advice}.")
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
    recorded = opened.goldens(artifact_id, device_class())
    return Target(folder=path, model=model, goldens=recorded[-1] if recorded else None)


def choose_goldens(target: Target, config: ServeConfig) -> tuple[Path | None, str]:
    """The goldens that a server replays before it is ready; None, and why, where none can be."""
    if not config.self_test:
        return None, "serve.self_test is false"
    if target.model.artifact_id is None:
        return None, "a plain folder has no goldens"
    if config.unmeasured:
        return (
            None,
            f"with {', '.join(f'serve.{name}' for name in config.unmeasured)} this engine computes other numbers",
        )
    if config.device != "cpu" or config.dtype not in ("auto", "float32"):
        return None, f"goldens are recorded on a CPU in float32, not for serve.device={config.device} {config.dtype}"
    if target.goldens is None:
        return None, f"no evaluation on this class of machines ({device_class()}) recorded goldens"
    return target.goldens, ""


def open_tokenizer(target: Target) -> Tokenizer:
    """The tokenizer of a target. A plain folder without a chat template of its own gets the one that the model_name of
    its config.ini stands for: LMDeploy's folders hold none, and its name was how it was found.

    `eos_token_ids` are then more than the folder says: give them to the engine, as `EngineConfig.end_ids`.
    """
    from engine.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(target.tokenizer_folder)
    if target.model.artifact_id is not None or tokenizer.chat_template is not None:
        return tokenizer
    from engine.storage.config_ini import read_config_ini
    from pipelines import chat_templates
    from pipelines.seed_names import SEED_NAMES

    name = read_config_ini(target.folder / CONFIG_INI).model_name
    template = SEED_NAMES[name].template if name in SEED_NAMES else None
    if template is None:
        return tokenizer
    said = f"chat template {template}, which model_name {name} of config.ini stands for"
    try:
        templated = chat_templates.open_tokenizer(target.tokenizer_folder, template)
    except ValueError as error:
        print(f"no {said}: {error.__cause__ or error}. The model only completes text", file=sys.stderr)
        return tokenizer
    print(said, file=sys.stderr)
    return templated
