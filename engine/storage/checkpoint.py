"""Checkpoints in a folder, Hugging Face's or Meta's, single or sharded, read tensor by tensor by canonical names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import Dtype, ModelConfig, Recipe
from engine.models import names
from engine.models.decoder import Decoder
from engine.models.families import family_of, model_config
from engine.models.layouts import META, Layout
from engine.models.quantization import Quantization, read_quantization, unquantized
from engine.storage.door import Source, sources
from engine.storage.json_file import read_object
from engine.storage.lazy_tensors import LazyTensors
from engine.storage.meta_checkpoint import PARAMS, open_meta
from engine.storage.packed_weights import WORDS, check_extras, find_awq, find_smooth_quant
from engine.storage.weight_files import WeightFile, check_names, open_weights
from engine.wording import shown

CONFIG = "config.json"
# The first that is there is read: one file, or the index of several.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS: dict[str, Dtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
UNSAID = (
    "packed ones need a quantization_config in config.json (without it `ingot convert --model-format awq` reads HF-AWQ)"
)
OTHER_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken")


class Checkpoint:
    """A checkpoint on disk. All shapes and byte ranges are checked when it is opened; values are read on demand."""

    def __init__(
        self,
        folder: Path,
        *,
        allow_bin: bool = False,
        allow_quantized: bool = False,
        described_in: Path | None = None,
        unsaid_awq: bool = False,
    ) -> None:
        """FileNotFoundError where there is no checkpoint, ValueError naming file and tensor for what does not fit.

        Pickled weights (.bin, .pth) are refused unless `allow_bin`, and then read as weights alone. Quantized ones are
        refused unless `allow_quantized`; the linears of their layers then have qweight, qzeros and scales. With
        `unsaid_awq` they are taken for HF-AWQ where config.json says nothing, as LMDeploy v0.1.0 left them; LMDeploy's
        8-bit ones are seen as what they are.
        `described_in` is the folder of config.json where the weights lie in another.
        """
        self.folder = folder
        self._described = described_in or folder
        self.quantization: Quantization | None = None
        self._allow_bin = allow_bin
        self._index: dict[str, str] = {}
        if not (self._described / CONFIG).exists() and (folder / PARAMS).exists():
            self.hf_config, ranks = open_meta(folder, read_object(folder / PARAMS), allow_bin=allow_bin)
            self.config, layout = self._read_config(), META
            self._weight_files: list[WeightFile] = [ranks]
        else:
            missing = f"{self._described} is not a checkpoint"
            self.hf_config = _read_config_json(self._described / CONFIG, missing=missing)
            self.quantization = self._read_quantization(allow_quantized)
            self.config, layout = self._read_config(), family_of(self.hf_config).layout
            self._weight_files = self._open_weight_files()
            if self.quantization is None:
                unsaid = find_awq(self._weight_files, folder) if unsaid_awq else find_smooth_quant(self._weight_files)
                self.quantization = self._allowed(unsaid, allow_quantized)
        stored = sum(len(file.tensors) for file in self._weight_files)
        if self.config.num_layers > stored:
            raise ValueError(
                f"{folder} holds {stored} tensors, but its configuration asks for {self.config.num_layers} layers"
            )
        try:
            self._sources = sources(self.config, layout, self.quantization)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self._places = self._check_tensors(layout)
        if all(self.hf_config.get(name) is None for name in ("dtype", "torch_dtype")):
            kind = self._places[names.EMBEDDING].tensors[self._sources[names.EMBEDDING].stored][0]
            self.config = replace(self.config, dtype=FLOATS[kind])

    @property
    def recipe(self) -> Recipe:
        """What the weights are, as they lie here."""
        if self.quantization is None:
            return Recipe()
        if self.quantization.int8:
            return Recipe(weights="w8a8")
        return Recipe(weights="w4a16", group_size=self.quantization.group_size)

    @property
    def files(self) -> list[Path]:
        """Every file that the model is made of, sorted: weights, configuration, tokenizer, chat template."""
        weights = [path for file in self._weight_files for path in file.paths]
        return sorted({*weights, *(path for pattern in OTHER_FILES for path in self.folder.glob(pattern))})

    def names(self) -> list[str]:
        """Canonical names of all tensors in the order of the forward pass; `lm_head.weight` even when it is tied."""
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, memory-mapped; KeyError for a name that is not in `names()`."""
        return self._read([name])[name]

    def layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer, named within it, as stored and memory-mapped."""
        places = self.layer_names(layer)
        found = self._read(places.values())
        return {within: found[name] for within, name in places.items()}

    def layer_names(self, layer: int) -> dict[str, str]:
        """The tensors of one layer: name within it -> canonical name."""
        prefix = names.layer_name(layer, "")
        return {name.removeprefix(prefix): name for name in self._places if name.startswith(prefix)}

    def weights(self) -> Mapping[str, Tensor]:
        """All tensors by canonical name, each read when it is asked for."""
        return LazyTensors(self.names(), self.tensor)

    def _read(self, wanted: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by canonical name, each file opened once. Nothing is kept here: the mapping of a file, and the memory
        that reading it took, go with the tensors."""
        of_file: dict[Path, list[str]] = {}
        for name in wanted:
            of_file.setdefault(self._places[name].path, []).append(name)
        found: dict[str, Tensor] = {}
        for together in of_file.values():
            stored = self._places[together[0]].read({self._sources[name].stored for name in together})
            found |= {name: self._sources[name].of(stored[self._sources[name].stored]) for name in together}
        return found

    def _read_config(self) -> ModelConfig:
        generation = self._described / "generation_config.json"
        try:
            hf_config = unquantized(self.hf_config)
            return model_config(hf_config, read_object(generation) if generation.exists() else None)
        except ValueError as error:
            raise ValueError(f"{self._described}: {error}") from error

    def _read_quantization(self, allowed: bool) -> Quantization | None:
        try:
            quantization = read_quantization(self.hf_config)
        except ValueError as error:
            raise ValueError(f"{self._described}: {error}") from error
        return self._allowed(quantization, allowed)

    def _allowed(self, quantization: Quantization | None, allowed: bool) -> Quantization | None:
        if quantization is not None and not allowed:
            raise ValueError(
                f"{self.folder} is quantized already ({quantization}), and unquantized weights are needed here: a "
                "build takes it over with weights=as_is"
            )
        return quantization

    def _open_weight_files(self) -> list[WeightFile]:
        name = next((name for name in WEIGHTS if (self.folder / name).exists()), None)
        if name is None:
            raise FileNotFoundError(
                f"{self.folder} has none of {', '.join(WEIGHTS)}: no other weights are read; fetch them, or convert "
                "them with transformers (save_pretrained)"
            )
        path = self.folder / name
        paths = self._shards(path) if path.suffix == ".json" else [path]
        return [open_weights(path, allow_bin=self._allow_bin) for path in paths]

    def _shards(self, index: Path) -> list[Path]:
        placed = read_placed(index)
        paths = sorted({self.folder / file for file in placed.values()})
        for path in paths:
            if not path.is_file():
                absent = min(name for name, file in placed.items() if self.folder / file == path)
                raise ValueError(
                    f"{path} is missing: {index.name} says that it holds {absent} and others; fetch that shard again"
                )
        self._index = placed
        return paths

    def _check_tensors(self, layout: Layout) -> dict[str, WeightFile]:
        """The file of each canonical tensor, after checking that all are there with their shapes."""
        found: dict[str, WeightFile] = {}
        used = {source.stored for source in self._sources.values()}
        codes = {source.stored: source.codes for source in self._sources.values() if source.codes}
        words = {source.stored: source.shape for source in self._sources.values() if source.codes == WORDS}
        extras = set() if self.quantization is None else check_extras(self._weight_files, words, self.quantization)
        for file in self._weight_files:
            for name, (kind, _) in file.tensors.items():
                if name in found:
                    raise ValueError(f"{file.path} holds {name}, and so does {found[name].path.name}: keep one of them")
                kinds = (codes[name],) if name in codes else tuple(FLOATS)
                looked_at = name in used or (self.quantization is None and not name.endswith(layout.ignored))
                if kind not in kinds and looked_at:
                    unsaid = f"; {UNSAID}" if kind == WORDS and self.quantization is None else ""
                    raise ValueError(
                        f"{file.path} holds {name} as {kind}; weights are read as {', '.join(kinds)}{unsaid}"
                    )
                found[name] = file
        for source in self._sources.values():
            if source.stored not in found:
                where = self.folder / self._index.get(source.stored, self._weight_files[0].path.name)
                raise ValueError(
                    f"{where} has no tensor {source.stored}, which config.json asks for{self._instead(source, found)}"
                )
            file = found[source.stored]
            if (actual := file.tensors[source.stored][1]) != source.shape:
                raise ValueError(
                    f"{file.path} holds {source.stored} with shape {shown(actual)}; config.json asks for {source.shape}"
                )
        self._check_surplus(found, layout, extras)
        return {name: found[source.stored] for name, source in self._sources.items()}

    def _check_surplus(self, found: Mapping[str, WeightFile], layout: Layout, extras: set[str]) -> None:
        """ValueError for a tensor that is not used; a tied head may be stored all the same."""
        used = {source.stored for source in self._sources.values()} | {layout.head} | extras
        surplus = [name for name in found if name not in used and not name.endswith(layout.ignored)]
        if surplus:
            raise ValueError(
                f"{found[surplus[0]].path} holds {surplus[0]}{' and others' if surplus[1:] else ''}, which the "
                f"architecture of config.json ({self.hf_config['architectures'][0]}) does not use: check config.json"
            )

    def _instead(self, missing: Source, found: Mapping[str, WeightFile]) -> str:
        """What a checkpoint with quantized weights has where a tensor is missing, and why that does not do."""
        module = missing.stored.rpartition(".")[0] + "."
        there = sorted(name for name in found if name.startswith(module))
        if self.quantization is None or not there:
            return ""
        return (
            f"; it has {there[0]}: a TurboMind workspace has all linears of its layers quantized alike, and the output "
            "matrix and the embedding not at all"
        )


def load_checkpoint(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_bin: bool = False,
    allow_quantized: bool = False,
) -> Decoder:
    """The model of a checkpoint folder, cast to `dtype` on `device`."""
    checkpoint = Checkpoint(folder, allow_bin=allow_bin, allow_quantized=allow_quantized)
    return Decoder(checkpoint.config, checkpoint.weights(), device=device, dtype=dtype)


def read_placed(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index of shards; ValueError for names that are none, or of another folder."""
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files: fetch it again")
    check_names(placed, index)
    for file in placed.values():
        if file in ("", "..") or Path(file).name != file or len(file) > 255 or not file.isprintable():
            raise ValueError(f"{index} names {shown(file)}, which is outside the checkpoint's folder or no file name")
    return placed


def _read_config_json(path: Path, *, missing: str) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{missing}: {path} does not exist") from None
