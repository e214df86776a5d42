"""A quantized workspace as a Hugging Face checkpoint. w4a16: HF-AWQ (GEMM), or compressed-tensors (pack-quantized);
w8a8: compressed-tensors (int-quantized), or LMDeploy's smooth_quant. Codes, zero points and scales are those of the
workspace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage.hf_config import HF_AWQ, SMOOTH_QUANT, check_form, hf_config, quantization_config
from engine.storage.packed_weights import LMDEPLOY_SCALE, pack_linear

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"


class Weights(Protocol):
    """What is written: a workspace, or anything else that holds quantized weights by their canonical names."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def tokenizer_folder(self) -> Path: ...
    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...


def export_checkpoint(workspace: Weights, folder: Path, *, form: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json (with its `quantization_config`), safetensors and the tokenizer into a new `folder`.

    Rank cuts are merged, rotary order is Hugging Face's, scales are fp16 (of w8a8 float32). The output matrix is left
    out, and the model marked as tied, when it is equal to the embedding. The folder appears when it is whole.
    ValueError for another form, other weights, or a model that no config.json says; FileExistsError when the folder is
    there.
    """
    check_form(form, workspace.recipe, workspace.folder)
    if workspace.recipe.head != "fp16":
        raise ValueError(
            f"{workspace.folder} has its output matrix in {workspace.recipe.head}, which no form holds: build the "
            "artifact with weights.head=fp16 to export it"
        )
    if workspace.recipe.rotate_down:
        raise ValueError(
            f"{workspace.folder} has down_proj's weight for inputs that are rotated by blocks of "
            f"{workspace.recipe.rotate_down} channels (rotate_down), and no form is read so: smooth_quant has no word "
            "for it, and transformers passes over the transform_config of compressed-tensors, so that answers would be "
            "wrong without an error. Build the artifact with weights.rotate_down=0 to export it"
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a folder that does not, the export makes it")
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tied = torch.equal(workspace.tensor(names.EMBEDDING), workspace.tensor(names.HEAD))
        described = hf_config(workspace.config, tied=tied)
        quantization = quantization_config(form, workspace.recipe)
        _write_json(temporary / "config.json", described | {"quantization_config": quantization})
        _copy_tokenizer(workspace, temporary)
        _write_weights(workspace, temporary, form=form, tied=tied, shard_bytes=shard_bytes)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(workspace: Weights, folder: Path, *, form: str, tied: bool, shard_bytes: int) -> None:
    """Shards of at most `shard_bytes` (or one layer, if that is more), of which one is in memory at a time."""
    pending: dict[str, Tensor] = {}
    where: dict[str, int] = {}
    total, count = 0, 0

    def flush() -> None:
        nonlocal pending, count
        # One metadata key: safetensors writes more than one in random order.
        save_file(pending, folder / f"shard-{count}.safetensors", metadata={"format": "pt"})
        pending, count = {}, count + 1

    for block in _blocks(workspace, tied=tied):
        stored = block if form == HF_AWQ else _packed(block, form)
        size = sum(tensor.nbytes for tensor in stored.values())
        if pending and sum(tensor.nbytes for tensor in pending.values()) + size > shard_bytes:
            flush()
        pending |= stored
        where |= dict.fromkeys(stored, count)
        total += size
    flush()
    if count == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        (folder / f"shard-{number}.safetensors").rename(folder / file)
    weight_map = {name: files[number] for name, number in where.items()}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _packed(block: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The tensors of a layer with its linears in one of the other forms."""
    stored: dict[str, Tensor] = {}
    for name, tensor in block.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            linear = pack_linear(tensor, block[f"{module}.qzeros"], block[f"{module}.scales"])
            stored |= {f"{module}.{part}": packed for part, packed in linear.items()}
        elif kind == names.WEIGHT_SCALE:
            stored[f"{module}.{LMDEPLOY_SCALE}" if form == SMOOTH_QUANT else name] = tensor[:, None]
        elif kind not in names.QUANTIZED:
            stored[name] = tensor
    return stored


def _blocks(workspace: Weights, *, tied: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the layers, then one layer after the other."""
    blocks: dict[int | None, list[str]] = {}
    for name in workspace.names():
        if not (tied and name == names.HEAD):
            blocks.setdefault(names.split_name(name)[0], []).append(name)
    for block in blocks.values():
        yield {name: workspace.tensor(name).contiguous() for name in block}


def _copy_tokenizer(workspace: Weights, folder: Path) -> None:
    """Everything of the tokenizer folder but code, the config and the index of the weights it came from."""
    if not workspace.tokenizer_folder.is_dir():
        return
    for path in sorted(workspace.tokenizer_folder.iterdir()):
        if path.is_file() and path.suffix != ".py" and path.name not in ("config.json", INDEX, "placeholder"):
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
