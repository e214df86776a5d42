"""A very small artifact with random weights, for tests of what is built around an engine: 0.1 M parameters, 300 ids."""

import json
import os
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from engine.config import ModelConfig, Recipe
from engine.models.names import model_tensors
from engine.storage.artifacts import write_manifest
from engine.storage.config_ini import weight_type_of, write_config_ini
from engine.storage.triton_repository import write_repository
from engine.storage.workspace import CONFIG_INI, TOKENIZER, WEIGHTS, write_weights

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SESSION_LEN = 128
# Engine processes that tests start: threads that wait for each other cost more than so small a model takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def write_tiny_artifact(
    folder: Path, *, chat_template: str | None = TEMPLATE, seed: int = 0, session_len: int = SESSION_LEN
) -> str:
    """Write the artifact into `folder` and return its id. Every id of the vocabulary has text except BOS and EOS."""
    tokenizer = folder / TOKENIZER
    tokenizer.mkdir(parents=True)
    vocab_size = write_tokenizer(tokenizer, chat_template=chat_template)
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        norm_eps=1e-5,
        max_position_embeddings=session_len,
        bos_token_id=0,
        eos_token_ids=(1,),
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = model_tensors(config)

    def tensor(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator) * (1.0 if "norm" in name else 0.2)

    recipe = Recipe()
    write_weights(folder / WEIGHTS, config, tensor, recipe=recipe, tp=1)
    write_config_ini(
        folder / WEIGHTS / CONFIG_INI,
        config,
        model_name="tiny",
        recipe=recipe,
        tp=1,
        session_len=session_len,
        weight_type=weight_type_of(config, recipe),
    )
    write_repository(folder, model_name="tiny", tp=1)
    return write_manifest(folder, recipe=recipe, sources={}, calibration=None, chat_template=None, tp=1)


def write_tokenizer(folder: Path, *, chat_template: str | None) -> int:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog ran to the cat in the rain"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(backend.get_vocab_size())
