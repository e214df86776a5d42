"""Meta's own checkpoints: params.json and consolidated.NN.pth, one file per tensor-parallel rank of the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.models import names
from engine.models.layouts import META
from engine.models.names import Shard
from engine.storage.weight_files import Shapes, WeightFile, open_weights
from engine.wording import cut, shown

PARAMS = "params.json"
PATTERNS = ("consolidated*.pth", "consolidated*.safetensors")
# The FFN's size is the weights' own, however it was chosen; the sizes of buffers change no number.
IGNORED = ("multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size")
READ = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")
AXES = {Shard.COLUMN: 0, Shard.ROW: 1, Shard.REPLICATED: None}
CUTS = {stored: AXES[names.LAYER_SHARDS[module]] for module, stored in META.modules.items()}


class JoinedRanks:
    """The files of all ranks as one file of whole tensors."""

    def __init__(self, files: list[WeightFile], *, hidden_size: int) -> None:
        """ValueError for ranks whose tensors do not fit each other."""
        self.path = files[0].path
        self.paths = [file.path for file in files]
        self._files = files
        self._cuts = {name: _cut(name, shape, hidden_size) for name, (_, shape) in files[0].tensors.items()}
        for file in files[1:]:
            if file.tensors != files[0].tensors:
                raise ValueError(
                    f"{file.path} does not hold the same names and shapes as {self.path}: fetch both again"
                )
        self.tensors: Shapes = {
            name: (kind, self._whole(name, shape)) for name, (kind, shape) in files[0].tensors.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors; what is cut is copied, and only then."""
        wanted = list(names)
        ranks = [file.read(wanted) for file in self._files]
        whole = {}
        for name in wanted:
            cut = self._cuts[name]
            pieces = [rank.pop(name) for rank in ranks]
            whole[name] = pieces[0] if cut is None or len(pieces) == 1 else torch.cat(pieces, dim=cut)
        return whole

    def _whole(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        cut = self._cuts[name]
        return tuple(size * len(self._files) if axis == cut else size for axis, size in enumerate(shape))


def open_meta(folder: Path, params: Mapping[str, Any], *, allow_bin: bool) -> tuple[dict[str, Any], JoinedRanks]:
    """The checkpoint's configuration in Hugging Face's words, and its tensors.

    FileNotFoundError without consolidated files; ValueError for one that is missing or not allowed, and for fields of
    params.json that are missing, unknown or not computed.
    """
    paths = next((found for pattern in PATTERNS if (found := sorted(folder.glob(pattern)))), [])
    if not paths:
        raise FileNotFoundError(f"{folder} has {PARAMS} but none of {', '.join(PATTERNS)}: fetch the weights")
    dim = params.get("dim")
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"{folder / PARAMS} has dim = {shown(dim)}; it must be a whole number from 1 on")
    ranks = JoinedRanks([open_weights(path, allow_bin=allow_bin) for path in paths], hidden_size=dim)
    return _hf_config(params, ranks, folder / PARAMS), ranks


def _cut(name: str, shape: tuple[int, ...], hidden_size: int) -> int | None:
    """The dimension along which ranks hold a part of a tensor; None for what each holds whole.

    Llama 1 and 2 cut the embedding along its features, Llama 3 along the vocabulary.
    """
    if name == META.embedding and len(shape) == 2:
        return 0 if shape[1] == hidden_size else 1
    if name == META.head:
        return 0
    module = name.removeprefix(META.layer_prefix).partition(".")[2].rpartition(".")[0]
    return CUTS.get(module)


def _hf_config(params: Mapping[str, Any], ranks: JoinedRanks, path: Path) -> dict[str, Any]:
    rope = _rope(params, path)
    known = {*READ, *IGNORED, "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "sliding_window"}
    if unknown := sorted(params.keys() - known):
        raise ValueError(
            f"{path} has {cut(unknown[0])} = {shown(params[unknown[0]])}, a field that this engine does not know: "
            "it may change the numbers. Take it out if it does not"
        )
    gate = f"{META.layer_prefix}0.{META.modules[names.GATE_UP[0]]}.weight"
    for name in (META.embedding, gate):
        if len(ranks.tensors.get(name, ("", ()))[1]) != 2:
            raise ValueError(f"{ranks.path} has no matrix {name}: it is not a checkpoint of Meta's Llama")
    rows, inner = ranks.tensors[META.embedding][1][0], ranks.tensors[gate][1][0]
    for field, actual in (("vocab_size", rows), ("hidden_dim", inner)):
        # Llama 2 was published with vocab_size -1: the tokenizer's.
        if params.get(field, -1) not in (-1, actual):
            raise ValueError(f"{path} has {field} = {shown(params[field])}, but the weights have {actual}")
    window = {"sliding_window": params["sliding_window"]} if params.get("sliding_window") is not None else {}
    config = {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "hidden_size": params["dim"],
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": params.get("n_heads"),
        "num_key_value_heads": params.get("n_kv_heads") or params.get("n_heads"),
        "head_dim": params.get("head_dim"),
        "intermediate_size": inner,
        "vocab_size": rows,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "max_position_embeddings": rope["original_max_position_embeddings"] if rope else 2048,
        "rope_scaling": rope,
        "tie_word_embeddings": False,
    }
    return config | window


def _rope(params: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Llama 3.1's scaling; its numbers but the factor are constants of Meta's code."""
    if not params.get("use_scaled_rope"):
        return None
    if params.get("rope_scaling_factor") is None:
        raise ValueError(
            f"{path} has use_scaled_rope without rope_scaling_factor: add the factor (8 for Llama 3.1, 32 for "
            "Llama 3.2), which is not in the weights"
        )
    return {
        "rope_type": "llama3",
        "factor": params["rope_scaling_factor"],
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor") or 4.0,
        "original_max_position_embeddings": 8192,
    }
