"""Checkpoints in the HF-AWQ format (GEMM layout, 4 bits), read tensor by tensor as they are: nothing is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.models.families import model_config
from engine.storage.weight_files import WeightFile, open_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What `quantization_config` may say where it says anything; `group_size` is compared on its own.
ALLOWED: dict[str, tuple[object, ...]] = {
    "quant_method": ("awq",),
    "bits": (4,),
    "version": ("gemm", "GEMM"),
    "zero_point": (True,),
}


class AwqCheckpoint:
    """Weights of `folder`, with the config.json of `config_folder` where that is another one.

    `recipe` has the group size. LMDeploy v0.1.0 wrote no `quantization_config`; such checkpoints are read too.
    """

    def __init__(self, folder: Path, *, config_folder: Path | None = None, group_size: int | None = None) -> None:
        """ValueError naming file and tensor, or field and value, for what is no 4-bit AWQ checkpoint of that group
        size; with None the size is what the checkpoint says."""
        self.folder = folder
        described = config_folder or folder
        hf_config = _read_json(described / "config.json")
        quantization = hf_config.pop("quantization_config", None) or {}
        generation = described / "generation_config.json"
        self.config: ModelConfig = model_config(hf_config, _read_json(generation) if generation.exists() else None)
        self._files = self._find()
        said = _group_size(self._check_quantization(quantization), self._stored_group_size(), described)
        if group_size is not None and group_size != said:
            raise ValueError(
                f"{folder} is quantized in groups of {said}, not {group_size}: give that size, or none to take it"
            )
        self.recipe = Recipe(weights="w4a16", group_size=said)
        self._check_tensors()

    def tensor(self, name: str) -> Tensor:
        """A tensor by canonical name: linears as qweight, qzeros and scales. A tied head is the embedding."""
        stored = name
        if name == names.HEAD and self.config.tie_word_embeddings:
            stored = names.EMBEDDING
        return self._files[stored].read([stored])[stored]

    def _find(self) -> dict[str, WeightFile]:
        if (self.folder / INDEX).is_file():
            placed = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
                raise ValueError(f"{self.folder / INDEX} has no weight_map of tensor names to files: fetch it again")
            paths = sorted({self.folder / file for file in placed.values()})
        else:
            paths = [self.folder / SINGLE]
        found: dict[str, WeightFile] = {}
        for path in paths:
            if path.parent != self.folder or not path.is_file():
                raise FileNotFoundError(f"{path} is missing: weights are read from {SINGLE} or what {INDEX} names")
            file = open_weights(path, allow_bin=False)
            found |= dict.fromkeys(file.tensors, file)
        return found

    def _check_quantization(self, quantization: dict[str, Any]) -> int | None:
        for field, allowed in ALLOWED.items():
            if field in quantization and quantization[field] not in allowed:
                raise ValueError(
                    f"{self.folder}: quantization_config has {field} = {quantization[field]!r}; awq is read with "
                    f"{' or '.join(map(repr, allowed))}"
                )
        if kept := set(quantization.get("modules_to_not_convert") or ()) - {"lm_head"}:
            raise ValueError(
                f"{self.folder}: quantization_config leaves {', '.join(sorted(kept))} unquantized, and a TurboMind "
                "workspace has one type for all linears of its layers"
            )
        said = quantization.get("group_size", quantization.get("q_group_size"))
        return said if isinstance(said, int) else None

    def _stored_group_size(self) -> int:
        """The group size that the shapes of the first linear give."""
        name = names.layer_name(0, names.LINEARS[0])
        for kind in names.QUANTIZED:
            if f"{name}.{kind}" not in self._files:
                raise ValueError(
                    f"{self.folder} has no tensor {name}.{kind}: it is no checkpoint in the HF-AWQ format of a model "
                    "whose layers are named as Llama's are"
                )
        inputs, groups = (self._files[f"{name}.{k}"].tensors[f"{name}.{k}"][1][0] for k in ("qweight", "scales"))
        return inputs // max(groups, 1)

    def _check_tensors(self) -> None:
        group_size = self.recipe.group_size
        for name, shape in names.model_tensors(self.config).items():
            module, _, kind = name.rpartition(".")
            expected: dict[str, tuple[int, ...]] = {name: shape}
            if names.split_name(module)[1] in names.LINEARS and kind == "weight":
                outputs, inputs = shape
                expected = {
                    f"{module}.qweight": (inputs, outputs // 8),
                    f"{module}.qzeros": (inputs // group_size, outputs // 8),
                    f"{module}.scales": (inputs // group_size, outputs),
                }
            elif name == names.HEAD and self.config.tie_word_embeddings:
                continue
            for stored, stored_shape in expected.items():
                if stored not in self._files:
                    raise ValueError(f"{self.folder} has no tensor {stored}, which config.json asks for")
                found = self._files[stored].tensors[stored][1]
                if found != stored_shape:
                    raise ValueError(f"{self._files[stored].path} holds {stored} as {found}, not {stored_shape}")


def _group_size(said: int | None, stored: int, folder: Path) -> int:
    if said is not None and said != stored:
        raise ValueError(f"{folder} says group_size {said}, but its tensors have groups of {stored}")
    return stored


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: fetch it again")
    return content
