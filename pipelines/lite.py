"""LMDeploy's `lite calibrate`, `auto_awq` and `smooth_quant` on plain folders: the work of the stages, without a build.

A work folder has what a build has under build/calibrate/<key>: stats.safetensors, blocks.safetensors and
calibration.json, which also says of which model and from which text they are. `auto_awq` puts a Hugging Face checkpoint
beside them (HF-AWQ, GEMM), `smooth_quant` one in LMDeploy's own form, with smoothing.safetensors and report.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.config import Dtype, Recipe
from engine.models import names
from engine.storage.checkpoint import Checkpoint
from engine.storage.hf_config import HF_AWQ, SMOOTH_QUANT
from engine.storage.hf_export import export_checkpoint
from engine.storage.turbomind_files import check_fits, float_type
from pipelines import sources
from pipelines.calibrate import calibrate, calibration_blocks
from pipelines.devices import check_device
from pipelines.quant import w4a16, w8a8
from pipelines.quant.stream import side_by_side
from pipelines.recipe_fields import weights_part
from pipelines.schema import METHODS, Weights
from pipelines.slices import write_json
from pipelines.text_options import DATA_SETS

ABOUT, STATISTICS, BLOCKS = "calibration.json", "stats.safetensors", "blocks.safetensors"
DATA_KINDS = (*DATA_SETS, "text", "chat")
REFERENCE = "reference"
LITE_METHODS = (*METHODS, REFERENCE)
SMOOTHINGS = ("searched", REFERENCE)
CONF = Path(__file__).resolve().parents[1] / "conf/calibration"
# How the stages name what these commands have flags for.
FLAGS = {
    "calibration.sequence_length": "--calib-seqlen",
    "calibration.samples": "--calib-samples",
    "weights.group_size": "--w-group-size",
    "model.allow_bin=true": "--allow-bin",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What to calibrate on: a named data set from `path` or the hub, drawn as LMDeploy draws it, or a text or
    conversations of one's own at `path`, drawn at random with seed 0."""

    dataset: str = "c4"
    path: Path | None = None
    samples: int = 128
    sequence_length: int = 2048


@contextmanager
def _in_flags() -> Iterator[None]:
    """What the stages say of options of a build is said of the flags that stand for them."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for option, flag in FLAGS.items():
            message = message.replace(option, flag)
        raise type(error)(message) from error


@_in_flags()
def calibrate_folder(
    model: Path, work: Path, data: Data, *, allow_bin: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Calibrate the checkpoint `model` into the folder `work`, and return what its calibration.json says.

    ValueError or FileNotFoundError where something does not fit, before anything is written.
    """
    _check_folders(model, work)
    check_device(device)
    checkpoint = Checkpoint(model, allow_bin=allow_bin)
    slice_part, place = _calibration(data)
    blocks, about = calibration_blocks(slice_part, checkpoint, locate=lambda _: place)
    with _added_to(work) as folder, side_by_side(device=device) as workers:
        save_file({"tokens": blocks}, folder / BLOCKS)
        save_file(calibrate(checkpoint, blocks, workers, device), folder / STATISTICS)
        about |= {"model": sources.folder_digest(model, allow_bin=allow_bin), "asked": slice_part}
        write_json(folder / ABOUT, about)
    return about


@_in_flags()
def auto_awq(
    model: Path,
    work: Path,
    data: Data | None = None,
    *,
    group_size: int = 128,
    method: str = "awq+gptq",
    symmetric: bool = False,
    allow_bin: bool = False,
    device: str = "cpu",
) -> bool:
    """Quantize `model` to 4 bits into `work`, an HF-AWQ checkpoint; whether it was calibrated for it.

    The calibration in `work` is used where it is of this model and, if `data` is given, of that; else it is made anew.
    `method` is one of `weights.method`, or `reference` for LMDeploy's formula.
    """
    _check_folders(model, work)
    check_device(device)
    if method not in LITE_METHODS:
        raise ValueError(f"--method {method} is not known; there are {', '.join(LITE_METHODS)}")
    if method == REFERENCE and symmetric:
        raise ValueError("--w-sym does not go with --method reference, whose formula has zero points")
    checkpoint = Checkpoint(model, allow_bin=allow_bin)
    weights = Weights(
        name="w4a16",
        group_size=group_size,
        search="none" if method == REFERENCE else "grid",
        method="awq" if method == REFERENCE else method,
        symmetric=symmetric,
    )
    check_fits(checkpoint.config, Recipe(weights="w4a16", group_size=group_size), tp=1)  # before any work
    fresh = method != "rtn" and not _calibrated(model, work, data, allow_bin=allow_bin)
    if fresh:
        calibrate_folder(model, work, data or Data(), allow_bin=allow_bin, device=device)
    _quantize(checkpoint, model, work, weights, form=HF_AWQ, allow_bin=allow_bin, device=device)
    return fresh


@_in_flags()
def smooth_quant(
    model: Path,
    work: Path,
    data: Data | None = None,
    *,
    method: str = "searched",
    allow_bin: bool = False,
    device: str = "cpu",
) -> bool:
    """Quantize `model` to int8 into `work`, a checkpoint as LMDeploy's `smooth_quant` writes one; whether it was
    calibrated for it.

    The calibration in `work` is used where it is of this model and, if `data` is given, of that; else it is made anew.
    `method` is `searched`, or `reference` for LMDeploy's formula.
    """
    _check_folders(model, work)
    if method not in SMOOTHINGS:
        raise ValueError(f"--method {method} is not known; there are {', '.join(SMOOTHINGS)}")
    checkpoint = Checkpoint(model, allow_bin=allow_bin)
    # LMDeploy's form has no word for inputs that are rotated.
    weights = Weights(name="w8a8", bits=8, search="none" if method == REFERENCE else "grid", rotate_down=0)
    check_fits(checkpoint.config, Recipe(weights="w8a8"), tp=1)  # before any work
    fresh = not _calibrated(model, work, data, allow_bin=allow_bin)
    if fresh:
        calibrate_folder(model, work, data or Data(dataset="ptb"), allow_bin=allow_bin, device=device)
    _quantize(checkpoint, model, work, weights, form=SMOOTH_QUANT, allow_bin=allow_bin, device=device)
    return fresh


def _quantize(
    checkpoint: Checkpoint, model: Path, work: Path, weights: Weights, *, form: str, allow_bin: bool, device: str
) -> None:
    """Put a Hugging Face checkpoint of quantized weights into `work`, which has the calibration."""
    part = weights_part(weights)
    recipe = Recipe(weights=weights.name, group_size=part.get("group_size", 0))
    with _added_to(work) as folder:
        package = w8a8 if weights.name == "w8a8" else w4a16
        package.quantize(part, model, work, folder, allow_bin=allow_bin, device=device)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        for path in sources.small_files(model):
            shutil.copyfile(path, tokenizer / path.name)
        quantized = _Quantized(checkpoint, folder / "weights.safetensors", recipe, tokenizer)
        export_checkpoint(quantized, folder / "hf", form=form)
        (folder / "weights.safetensors").unlink()
        shutil.rmtree(tokenizer)
        for path in (folder / "hf").iterdir():
            path.rename(folder / path.name)
        (folder / "hf").rmdir()
        for old in work.glob("model*.safetensors*"):
            old.unlink()


class _Quantized:
    """A checkpoint whose layers are those of a finished `quantize`, to be written by `export_checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, weights: Path, recipe: Recipe, tokenizer: Path) -> None:
        self.folder = checkpoint.folder
        self._dtype = float_type(checkpoint.config, recipe)
        stored: Dtype = "bfloat16" if self._dtype == torch.bfloat16 else "float16"
        self.config = replace(checkpoint.config, dtype=stored)
        self.recipe = recipe
        self.tokenizer_folder = tokenizer
        self._checkpoint, self._weights = checkpoint, weights

    @cached_property
    def _quantized(self) -> list[str]:
        with safe_open(self._weights, framework="pt") as opened:
            return list(opened.keys())

    def names(self) -> list[str]:
        return [names.EMBEDDING, *self._quantized, names.FINAL_NORM, names.HEAD]

    def tensor(self, name: str) -> Tensor:
        if name in (names.EMBEDDING, names.FINAL_NORM, names.HEAD):
            stored = self._checkpoint.tensor(name)
            found = stored.to(self._dtype)
            if not bool(torch.isfinite(found).all()):
                raise ValueError(
                    f"{name} of {self.folder} has values that {self.config.dtype} does not hold, or that are no numbers"
                )
            return found
        with safe_open(self._weights, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


def _calibration(data: Data) -> tuple[dict[str, Any], Path]:
    """The part `calibration` of a slice, and where its text is."""
    if data.dataset not in DATA_KINDS:
        raise ValueError(f"--calib-dataset {data.dataset} is not known; there are {', '.join(DATA_KINDS)}")
    for flag, number, least in (("samples", data.samples, 1), ("seqlen", data.sequence_length, 2)):
        if number < least:
            raise ValueError(f"--calib-{flag} {number} must be at least {least}")
    options = {"samples": data.samples, "sequence_length": data.sequence_length}
    named = data.dataset in DATA_SETS
    entry = yaml.safe_load((CONF / f"{data.dataset}.yaml").read_text(encoding="utf-8")) if named else {}
    place = data.path or (Path(entry["path"]) if entry.get("path") else None)
    record: dict[str, Any] = {"kind": "dataset", "name": data.dataset} if named else {"kind": data.dataset}
    if place is None and not (named and entry.get("repo")):
        what = "has no copy on the hub that is no program" if named else "is your own"
        raise ValueError(f"--calib-dataset {data.dataset} {what}: give its file or folder with --calib-path")
    if place is None:
        record |= {key: entry.get(key) for key in ("repo", "revision", "subset")}
    elif not place.exists():
        raise FileNotFoundError(f"--calib-path {place} does not exist")
    else:
        record["digest"] = sources.measure(record, place, sources.sha256_file)
    column = entry.get("column") or ("messages" if data.dataset == "chat" else "text")
    text = {**record, "column": column} | ({"split": entry.get("split")} if named else {})
    sampling = {"sampling": "reference"} if named else {"sampling": "random", "seed": 0}
    return {"text": text, **options, **sampling}, place or CONF


def _calibrated(model: Path, work: Path, data: Data | None, *, allow_bin: bool) -> bool:
    """Whether `work` holds a whole calibration of this model on this data."""
    if not all((work / name).is_file() for name in (ABOUT, STATISTICS, BLOCKS)):
        return False
    about = json.loads((work / ABOUT).read_text(encoding="utf-8"))
    if not isinstance(about, Mapping) or about.get("model") != sources.folder_digest(model, allow_bin=allow_bin):
        return False
    return data is None or about.get("asked") == _calibration(data)[0]


def _check_folders(model: Path, work: Path) -> None:
    if not model.is_dir():
        raise FileNotFoundError(
            f"{model} is not a folder. Nothing is fetched here: download the checkpoint first and give its folder"
        )
    if work.exists() and work.resolve() == model.resolve():
        raise ValueError(f"--work-dir {work} is the model's own folder: name another, the model is not overwritten")
    if work.exists() and (not work.is_dir() or ((work / "config.json").exists() and not (work / ABOUT).exists())):
        raise ValueError(f"--work-dir {work} holds something else, a checkpoint or a file: name another folder")


@contextmanager
def _added_to(work: Path) -> Iterator[Path]:
    """A new empty folder whose files are moved into `work` when the block ends without an error."""
    existed = work.exists()
    work.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=work) as temporary:
            yield Path(temporary)
            for path in sorted(Path(temporary).iterdir()):
                path.replace(work / path.name)
    except BaseException:
        if not existed:
            shutil.rmtree(work, ignore_errors=True)
        raise
