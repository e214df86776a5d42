"""A checkpoint as a plain TurboMind workspace, in one step and without a build: nobody measures what comes out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint
from engine.storage.config_ini import weight_type_of, write_config_ini
from engine.storage.ini_keys import IniConfig
from engine.storage.triton_repository import link_repository, write_repository
from engine.storage.workspace import CONFIG_INI, TOKENIZER, WEIGHTS
from pipelines.chat_templates import open_tokenizer, write_template
from pipelines.seed_names import SEED_NAMES
from pipelines.slices import output
from pipelines.sources import small_files
from pipelines.template_files import ENDS, OWN
from pipelines.token_ids import with_token_ids
from pipelines.written_weights import write_with_bar

FORMATS = ("hf", "awq", "llama")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written: config.ini, the chat template (its name, or `own` for the checkpoint's; None for none), and in
    words what a user has to know."""

    ini: IniConfig
    template: str | None
    warning: str | None


def convert(asked: Conversion) -> Converted:
    """Write the workspace, whole or not at all, with the chat template that its name stands for.

    ValueError or FileNotFoundError before a weight is written. A folder that is there is replaced only with
    `overwrite`, and only if it is a workspace.
    """
    _check_places(asked)
    checkpoint = _open(asked)
    seed_name = SEED_NAMES.get(asked.name)
    with output(asked.target) as folder:
        weights = folder / WEIGHTS
        _copy_tokenizer(asked, folder / TOKENIZER)
        tokenizer, warning = _give_template(asked, folder / TOKENIZER, seed_name.template if seed_name else None)
        config, recipe = with_token_ids(checkpoint.config, tokenizer), checkpoint.recipe
        write_with_bar(weights, config, checkpoint.tensor, recipe=recipe, tp=asked.tp, title="convert")
        ini = write_config_ini(
            weights / CONFIG_INI,
            config,
            model_name=asked.name,
            recipe=recipe,
            tp=asked.tp,
            session_len=seed_name.session_len if seed_name else config.max_position_embeddings,
            weight_type=weight_type_of(config, recipe),
        )
        write_repository(folder, model_name=asked.name, tp=asked.tp)
        link_repository(folder)
        _check_places(asked)  # once more: it took a while
    named = seed_name.template if seed_name and warning is None else None
    return Converted(ini=ini, template=named or (OWN if tokenizer.chat_template else None), warning=warning)


def _open(asked: Conversion) -> Checkpoint:
    folder = asked.weights_folder or asked.source
    pickled = [path for pattern in PICKLED for path in folder.glob(pattern)]
    if pickled and not asked.allow_bin and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{pickled[0]} is a pickled file: with --allow-bin torch reads it as weights alone, without running code; "
            "or convert the checkpoint to safetensors"
        )
    is_meta = not (asked.source / "config.json").is_file() and (asked.source / "params.json").is_file()
    if is_meta != (asked.model_format == "llama"):
        raise ValueError(
            f"{asked.source} is {'a Meta' if is_meta else 'no Meta'} checkpoint (params.json, consolidated.*.pth): "
            f"give --model-format {'llama' if is_meta else 'hf or awq'}"
        )
    checkpoint = Checkpoint(
        folder,
        allow_bin=asked.allow_bin,
        allow_quantized=True,
        described_in=asked.source,
        unsaid_awq=asked.model_format == "awq",
    )
    found = checkpoint.recipe.group_size
    if asked.group_size and not found:
        raise ValueError(
            f"--group-size {asked.group_size} is for weights that are quantized already: give --model-format awq with "
            "an AWQ checkpoint, or leave it out"
        )
    if asked.group_size not in (None, found):
        raise ValueError(
            f"{folder} is quantized in groups of {found}, not {asked.group_size}: give that size, or none to take it"
        )
    return checkpoint


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
    for path in small_files(asked.source):
        if given is None or given.is_file() or path.name in CONFIGURATION:
            shutil.copyfile(path, target / path.name)
    for path in [given] if given and given.is_file() else small_files(given) if given else []:
        if path.name not in CONFIGURATION:
            shutil.copyfile(path, target / path.name)


def _give_template(asked: Conversion, folder: Path, template: str | None) -> tuple[Tokenizer, str | None]:
    """The tokenizer in `folder`, with a template instead of its own; and a warning where that one does not fit it.

    ValueError where there is no tokenizer: nothing could be served.
    """
    tokenizer = Tokenizer(folder)
    if template is None:
        return tokenizer, None
    try:
        templated = open_tokenizer(folder, template)
    except ValueError as error:
        reason = error.__cause__ or f"it has no token {ENDS.get(template)}"
        instead = "the checkpoint's own is kept" if tokenizer.chat_template else "the model only completes text"
        said = f"{asked.name} stands for the chat template {template}, which does not fit this tokenizer"
        return tokenizer, f"{said} ({reason}): {instead}"
    write_template(templated, folder)
    return templated, None
