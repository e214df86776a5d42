"""A model with random weights as a Hugging Face checkpoint, for engines that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.random_weights import RandomWeights
from benchmarks.random_workspace import write_tokenizer
from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.storage.hf_config import COMPRESSED_TENSORS, HF_AWQ, hf_config, quantization_config

# How weights leave; None is a plain checkpoint.
FORMS = {"fp16": None, "w8a8": COMPRESSED_TENSORS, "w4a16": HF_AWQ}


def write_checkpoint(
    folder: Path, config: ModelConfig, recipe: Recipe, *, seed: int = 0, device: torch.device | str = "cpu"
) -> None:
    """The weights of `RandomWeights` on this device with this seed: a file a layer, in the form of FORMS, with
    config.json and tokenizer.

    ValueError for weights that have no such form, and for a model that no config.json says.
    """
    if recipe.weights not in FORMS or recipe.head != "fp16":
        raise ValueError(f"a checkpoint of random {recipe} weights cannot be written; {', '.join(FORMS)} can.")
    content = hf_config(config, tied=config.tie_word_embeddings)
    if (form := FORMS[recipe.weights]) is not None:
        content["quantization_config"] = quantization_config(form, recipe)
    weights = RandomWeights(config, recipe, device=device, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_tokenizer(folder, config.vocab_size)
    layers: dict[int | None, list[str]] = {}
    for name in weights:
        layers.setdefault(names.split_name(name)[0], []).append(name)
    placed: dict[str, str] = {}
    total = 0
    for number, of_layer in enumerate(layers.values()):
        file = f"model-{number + 1:05}-of-{len(layers):05}.safetensors"
        tensors = {name: _stored(name, weights[name].cpu()) for name in of_layer}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor as the forms have it: scales of int8 rows stand in a column."""
    return tensor[:, None] if name.endswith(f".{names.WEIGHT_SCALE}") else tensor
