"""A model with random weights as a folder: a TurboMind workspace with its manifest, or a tokenizer alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks.random_weights import RandomWeights, random_kv_scales
from engine.config import ModelConfig, Recipe
from engine.models.cache import KVScales
from engine.runtime.token_bytes import byte_level_alphabet
from engine.storage.artifacts import write_manifest
from engine.storage.config_ini import weight_type_of, write_config_ini
from engine.storage.kv_scale_files import layer_of, write_layer_scales
from engine.storage.triton_repository import write_repository
from engine.storage.workspace import CONFIG_INI, TOKENIZER, WEIGHTS, write_weights

SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}<s>assistant:"


def write_workspace(
    folder: Path, name: str, config: ModelConfig, recipe: Recipe, *, tp: int = 1, seed: int = 0, session_len: int = 0
) -> str:
    """Write a workspace of random weights into `folder`, which must not exist, and return its artifact id.

    `session_len` 0 is the model's own length. ValueError, before anything is written, for a model that does not fit.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a folder that does not, or remove it.")
    weights = RandomWeights(config, recipe, device="cpu", seed=seed)
    written = write_weights(folder / WEIGHTS, config, weights.__getitem__, recipe=recipe, tp=tp)
    write_config_ini(
        folder / WEIGHTS / CONFIG_INI,
        config,
        model_name=name,
        recipe=recipe,
        tp=tp,
        session_len=session_len or config.max_position_embeddings,
        weight_type=weight_type_of(config, recipe),
    )
    scales = random_kv_scales(config, recipe)
    if isinstance(scales, KVScales):
        for layer in range(config.num_layers):
            rows = layer_of(scales, layer)
            write_layer_scales(folder / WEIGHTS, layer, rows, granularity=recipe.kv_granularity, tp=tp)
    write_tokenizer(folder / TOKENIZER, config.vocab_size)
    write_repository(folder, model_name=name, tp=tp)
    entries = [replace(entry, path=f"{WEIGHTS}/{entry.path}") for entry in written]
    return write_manifest(
        folder, recipe=recipe, sources={}, calibration=None, chat_template=None, tp=tp, written=entries
    )


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` entries: three special ones, the 256 bytes, and words that only a model writes.

    Every text can be encoded, a byte a token; what random weights answer reads as words of real length.
    """
    alphabet = byte_level_alphabet()
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        raise ValueError(f"a tokenizer of bytes needs a vocabulary of at least {least}, not {vocab_size}.")
    entries = [*SPECIAL, *sorted(alphabet, key=alphabet.__getitem__)]
    entries += [f"Ġw{number}" for number in range(vocab_size - least)]
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": {text: number for number, text in enumerate(entries)}, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
