"""A checkpoint as a plain TurboMind workspace, in one step and without a build: nobody measures what comes out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.runtime.tokenizer import Tokenizer
from engine.storage.awq_checkpoint import AwqCheckpoint
from engine.storage.checkpoint import Checkpoint
from engine.storage.config_ini import IniConfig, weight_type_of, write_config_ini
from engine.storage.triton_repository import link_repository, write_repository
from engine.storage.workspace import CONFIG_INI, TOKENIZER, WEIGHTS, write_weights
from pipelines.slices import output
from pipelines.sources import MODEL_FILES

FORMATS = ("hf", "awq", "llama")
# The longest sequence that LMDeploy v0.1.0 gives its chat templates, 8 tokens of room included.
SESSION_LENS = {
    **dict.fromkeys(
        (
            *("base", "llama", "internlm", "vicuna", "wizardlM", "internlm-chat", "internlm-chat-7b", "baichuan-7b"),
            *("baichuan2-7b", "puyu", "solar", "ultracm", "ultralm", "yi"),
        ),
        2056,
    ),
    **dict.fromkeys(("llama2", "codellama", "internlm-20b"), 4104),
    **dict.fromkeys(("internlm-chat-20b", "internlm-chat-7b-8k", "qwen-7b", "qwen-14b"), 8200),
}
PICKLED = ("*.bin", "*.pth")
CONFIGURATION = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is converted to where. `name` is that of a chat template, as the reference calls it, or any other.

    `weights_folder` holds the weights where they are not beside config.json; `group_size` None is the checkpoint's own.
    """

    name: str
    source: Path
    target: Path
    model_format: str = "hf"
    group_size: int | None = None
    tp: int = 1
    tokenizer: Path | None = None
    weights_folder: Path | None = None
    overwrite: bool = False
    allow_bin: bool = False


def convert(asked: Conversion) -> IniConfig:
    """Write the workspace, whole or not at all, and return its config.ini.

    ValueError or FileNotFoundError before a byte is written. A folder that is there is replaced only with `overwrite`,
    and only if it is a workspace.
    """
    _check_places(asked)
    config, recipe, tensor = _open(asked)
    with output(asked.target) as folder:
        weights = folder / WEIGHTS
        write_weights(weights, config, tensor, recipe=recipe, tp=asked.tp)
        ini = write_config_ini(
            weights / CONFIG_INI,
            config,
            model_name=asked.name,
            recipe=recipe,
            tp=asked.tp,
            session_len=SESSION_LENS.get(asked.name, config.max_position_embeddings),
            weight_type=weight_type_of(config, recipe),
        )
        _copy_tokenizer(asked, folder / TOKENIZER)
        write_repository(folder, model_name=asked.name, tp=asked.tp)
        link_repository(folder)
    return ini


def _open(asked: Conversion) -> tuple[ModelConfig, Recipe, Callable[[str], Tensor]]:
    if asked.model_format == "awq":
        described = asked.source if asked.weights_folder else None
        awq = AwqCheckpoint(asked.weights_folder or asked.source, config_folder=described, group_size=asked.group_size)
        return awq.config, awq.recipe, awq.tensor
    if asked.group_size:
        raise ValueError(
            f"--group-size {asked.group_size} is for weights that are quantized already: give --model-format awq with "
            "an AWQ checkpoint, or leave it out"
        )
    is_meta = not (asked.source / "config.json").is_file() and (asked.source / "params.json").is_file()
    if is_meta != (asked.model_format == "llama"):
        raise ValueError(
            f"{asked.source} is {'a Meta' if is_meta else 'no Meta'} checkpoint (params.json, consolidated.*.pth): "
            f"give --model-format {'llama' if is_meta else 'hf or awq'}"
        )
    pickled = [path for pattern in PICKLED for path in asked.source.glob(pattern)]
    if pickled and not asked.allow_bin and not list(asked.source.glob("*.safetensors")):
        raise ValueError(
            f"{pickled[0]} is a pickled file: with --allow-bin torch reads it as weights alone, without running code; "
            "or convert the checkpoint to safetensors"
        )
    checkpoint = Checkpoint(asked.source, allow_bin=asked.allow_bin)
    return checkpoint.config, Recipe(), checkpoint.tensor


def _check_places(asked: Conversion) -> None:
    if asked.model_format not in FORMATS:
        raise ValueError(f"--model-format {asked.model_format} is not known; there are {', '.join(FORMATS)}")
    if asked.weights_folder and asked.model_format != "awq":
        raise ValueError("--quant-path names the folder of AWQ weights: it goes with --model-format awq")
    for folder in (asked.source, asked.weights_folder):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder. Nothing is fetched here: download the checkpoint first and give its folder"
            )
    if asked.tokenizer is not None and not asked.tokenizer.exists():
        raise FileNotFoundError(f"--tokenizer-path {asked.tokenizer} does not exist")
    target = asked.target
    if not target.exists() and not target.is_symlink():
        return
    if not asked.overwrite:
        raise ValueError(f"{target} exists already. Give --overwrite to replace it, or another folder with --dst-path")
    kept = [path.resolve() for path in (asked.source, asked.weights_folder, asked.tokenizer) if path is not None]
    if target.is_symlink() or not (target / WEIGHTS / CONFIG_INI).is_file():
        raise ValueError(f"{target} is not a TurboMind workspace, so --overwrite does not remove it: name another")
    if any(path.is_relative_to(target.resolve()) for path in kept):
        raise ValueError(f"{target} holds what is to be converted: name another folder with --dst-path")


def _copy_tokenizer(asked: Conversion, target: Path) -> None:
    """The checkpoint's configuration and tokenizer; a tokenizer folder that is given replaces it, a file is added."""
    given = asked.tokenizer
    target.mkdir(parents=True)
    for path in _small_files(asked.source):
        if given is None or given.is_file() or path.name in CONFIGURATION:
            shutil.copyfile(path, target / path.name)
    for path in [given] if given and given.is_file() else _small_files(given) if given else []:
        if path.name not in CONFIGURATION:
            shutil.copyfile(path, target / path.name)
    Tokenizer(target)  # ValueError where there is none: nothing could be served


def _small_files(folder: Path) -> list[Path]:
    patterns = [pattern for pattern in MODEL_FILES if "safetensors" not in pattern]
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
