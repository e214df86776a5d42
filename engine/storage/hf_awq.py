"""Export of a w4a16 workspace as a Hugging Face checkpoint in the AWQ GEMM format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models import names
from engine.storage.workspace import Workspace

SHARD_BYTES = 2 << 30
INDEX = "model.safetensors.index.json"


def export_hf_awq(workspace: Workspace, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json (with its `quantization_config`), safetensors and the tokenizer into a new `folder`.

    `group_size` comes from the workspace; rank cuts are merged, rotary order is Hugging Face's, scales are fp16. The
    output matrix is left out, and the model marked as tied, when it is equal to the embedding. The folder appears
    when it is whole. ValueError for a workspace of other weights, FileExistsError when the folder is there.
    """
    if workspace.recipe.weights != "w4a16":
        raise ValueError(
            f"{workspace.folder} holds {workspace.recipe.weights} weights; only w4a16 can be exported as HF-AWQ"
        )
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a folder that does not, the export makes it")
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tied = torch.equal(workspace.tensor(names.EMBEDDING), workspace.tensor(names.HEAD))
        _copy_tokenizer(workspace, temporary)
        _write_weights(workspace, temporary, tied=tied, shard_bytes=shard_bytes)
        _write_json(temporary / "config.json", hf_config(workspace, tied=tied))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hf_config(workspace: Workspace, *, tied: bool) -> dict[str, Any]:
    """The config.json of the exported checkpoint: a LlamaForCausalLM, whatever family it came from."""
    config = workspace.config
    plain = not (config.qk_norm or config.logn or config.sliding_window or config.rope_scaling)
    if not plain:
        raise ValueError(
            f"{workspace.folder} has norms over heads, logn attention, a sliding window or a scaled rotary embedding, "
            "which the LlamaForCausalLM of this export does not say"
        )
    eos: int | list[int] | None = list(config.eos_token_ids)
    if len(config.eos_token_ids) < 2:
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.qkv_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": workspace.recipe.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        },
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "vocab_size": config.vocab_size,
    }


def _write_weights(workspace: Workspace, folder: Path, *, tied: bool, shard_bytes: int) -> None:
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
        size = sum(tensor.nbytes for tensor in block.values())
        if pending and sum(tensor.nbytes for tensor in pending.values()) + size > shard_bytes:
            flush()
        pending |= block
        where |= dict.fromkeys(block, count)
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


def _blocks(workspace: Workspace, *, tied: bool) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the layers, then one layer after the other."""
    blocks: dict[int | None, list[str]] = {}
    for name in workspace.names():
        if not (tied and name == names.HEAD):
            blocks.setdefault(names.split_name(name)[0], []).append(name)
    for block in blocks.values():
        yield {name: workspace.tensor(name).contiguous() for name in block}


def _copy_tokenizer(workspace: Workspace, folder: Path) -> None:
    """Everything of the tokenizer folder but code, the config and the index of the weights it came from."""
    if not workspace.tokenizer_folder.is_dir():
        return
    for path in sorted(workspace.tokenizer_folder.iterdir()):
        if path.is_file() and path.suffix != ".py" and path.name not in ("config.json", INDEX, "placeholder"):
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
