"""Hugging Face checkpoints: config.json and safetensors files in a folder, single or sharded, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.config import ModelConfig
from engine.models import names
from engine.models.decoder import Decoder
from engine.models.families import model_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F16", "BF16", "F32")
# Buffers that old checkpoints carry and every reader recomputes.
IGNORED = ("self_attn.rotary_emb.inv_freq",)


class Checkpoint:
    """A checkpoint on disk. All shapes and byte ranges are checked when it is opened; values are read on demand."""

    def __init__(self, folder: Path) -> None:
        """FileNotFoundError where there is no checkpoint, ValueError naming file and tensor for what does not fit."""
        self.folder = folder
        self.hf_config = _read_json(folder / "config.json", missing=f"{folder} is not a checkpoint")
        generation = folder / "generation_config.json"
        try:
            self.config: ModelConfig = model_config(
                self.hf_config, _read_json(generation, missing="") if generation.exists() else None
            )
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self._index: dict[str, str] = {}
        self._weight_files = self._find_weight_files()
        self._places = self._check_tensors()

    @property
    def files(self) -> list[Path]:
        """Every file that the model is made of, sorted: weights, configuration, tokenizer, chat template."""
        others = [path for pattern in ("*.json", "*.jinja", "tokenizer.model") for path in self.folder.glob(pattern)]
        return sorted({*self._weight_files, *others})

    def names(self) -> list[str]:
        """Canonical names of all tensors in the order of the forward pass; `lm_head.weight` even when it is tied."""
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, memory-mapped; KeyError for a name that is not in `names()`."""
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as opened:
            return _tensor(opened, stored)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer, named within it, as stored and memory-mapped.

        Nothing is kept here: the mapping of a file, and the memory that reading it took, go with the tensors.
        """
        wanted = {name: self._places[names.layer_name(layer, name)] for name in names.layer_tensors(self.config)}
        loaded: dict[str, Tensor] = {}
        for path in sorted({path for path, _ in wanted.values()}):
            with safe_open(path, framework="pt") as opened:
                loaded |= {name: _tensor(opened, stored) for name, (at, stored) in wanted.items() if at == path}
        return loaded

    def weights(self) -> Mapping[str, Tensor]:
        """All tensors by canonical name, each read when it is asked for."""
        return _Weights(self)

    def _find_weight_files(self) -> list[Path]:
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        if not (self.folder / INDEX).exists():
            raise FileNotFoundError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}: only safetensors weights are read; "
                "convert other formats with transformers (save_pretrained)"
            )
        placed = _read_json(self.folder / INDEX, missing="").get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise ValueError(f"{self.folder / INDEX} has no weight_map of tensor names to files: fetch it again")
        files = sorted({self.folder / file for file in placed.values()})
        for path in files:
            if path.parent != self.folder:
                raise ValueError(f"{self.folder / INDEX} names {path}, which is outside the checkpoint's folder")
            if not path.exists():
                absent = min(name for name, file in placed.items() if self.folder / file == path)
                raise ValueError(
                    f"{path} is missing: {INDEX} says that it holds {absent} and others; fetch that shard again"
                )
        self._index = placed
        return files

    def _check_tensors(self) -> dict[str, tuple[Path, str]]:
        """Where each canonical tensor lies (file, stored name), after checking that all are there with their shapes."""
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path in self._weight_files:
            for name, (kind, shape) in _read_header(path).items():
                if name in found:
                    raise ValueError(f"{path} holds {name}, and so does {found[name][0].name}: keep one of them")
                if kind not in FLOATS and not name.endswith(IGNORED):
                    raise ValueError(f"{path} holds {name} as {kind}; weights are read as {', '.join(FLOATS)}")
                found[name] = (path, shape)
        expected = names.model_tensors(self.config)
        places: dict[str, tuple[Path, str]] = {}
        for name, shape in expected.items():
            stored = names.EMBEDDING if name == names.HEAD and self.config.tie_word_embeddings else name
            if stored not in found:
                where = self.folder / self._index.get(stored, INDEX if self._index else SINGLE)
                raise ValueError(f"{where} has no tensor {stored}, which config.json asks for")
            path, actual = found[stored]
            if actual != shape:
                raise ValueError(f"{path} holds {stored} with shape {actual}; config.json asks for {shape}")
            places[name] = (path, stored)
        surplus = [name for name in found if name not in expected and not name.endswith(IGNORED)]
        if surplus:
            raise ValueError(
                f"{found[surplus[0]][0]} holds {surplus[0]}{' and others' if surplus[1:] else ''}, which the "
                f"architecture of config.json ({self.hf_config['architectures'][0]}) does not use: check config.json"
            )
        return places


def load_checkpoint(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a checkpoint folder, cast to `dtype` on `device`."""
    checkpoint = Checkpoint(folder)
    return Decoder(checkpoint.config, checkpoint.weights(), device=device, dtype=dtype)


class _Weights(Mapping[str, Tensor]):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = dict.fromkeys(checkpoint.names())

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _tensor(opened: Any, stored: str) -> Tensor:
    loaded: Tensor = opened.get_tensor(stored)
    return loaded


def _read_json(path: Path, *, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{missing}: {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: fetch it again")
    return content


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of a safetensors file; ValueError naming the first tensor that is cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header_end = 8 + length
        if size < 8 or header_end > size:
            raise ValueError(f"{path} is cut off or not a safetensors file: its header does not fit in {size} bytes")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            header = {
                name: (entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1])
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is not a safetensors file: its header cannot be read ({error!r})") from error
    for name, (_, _, end) in sorted(header.items(), key=lambda item: item[1][2]):
        if header_end + end > size:
            raise ValueError(
                f"{path} is cut off: {name} ends at byte {header_end + end} of {size}; fetch that file again"
            )
    return {name: (kind, shape) for name, (kind, shape, _) in header.items()}
