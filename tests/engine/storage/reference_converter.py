"""A second converter, for tests alone: checkpoint folder in, the bytes of every file of `triton_models/weights` out.

Written from the published facts of LMDeploy v0.1.0 and from docs/formats.md, with a formula where the project has a
reshape, and without its code. `as_reference` is v0.1.0 with its mistakes; without it the model is right: real heads,
what the cuts fill up, families and biases that v0.1.0 does not know. Everything is in memory: checkpoints are tiny.
"""

from __future__ import annotations

import json
from functools import cache
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.engine.storage.reference_source import FAMILIES, Source, Tensors


def convert(
    folder: Path,
    family: str,
    *,
    model_name: str,
    session_len: int,
    ids: tuple[int, int],
    tp: int,
    group_size: int = 0,
    as_reference: bool = True,
    ingot: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Name -> bytes of every file; `group_size` above 0 is for AWQ weights, `ids` are the tokenizer's BOS and EOS,
    `ingot` is what the section of that name has to say."""
    source = Source(folder, FAMILIES[family])
    says = _says(source, family, group_size, as_reference)
    size = says["size_per_head"]
    dtype = torch.bfloat16 if says["weight_type"] == "bf16" else torch.float16
    files: dict[str, Tensor] = {}
    embedding, norm, head = (source.tensors.get(f"{name}.weight") for name in source.family.outer)
    if head is None and not as_reference:
        head = embedding
    if head is not None:
        head = torch.nn.functional.normalize(head) if source.family.unit_head else head
        files["output.weight"] = _fill(head, 0, tp).to(dtype)
    files["tok_embeddings.weight"] = _fill(embedding, 0, tp).to(dtype)
    files["norm.weight"] = norm.to(dtype)
    for layer in range(says["num_layer"]):
        of_layer = _layer(source, layer, size, dtype, group_size, tp, as_reference)
        files |= {f"layers.{layer}.{name}": tensor for name, tensor in of_layer.items()}
    written = {name: _bytes(tensor) for name, tensor in files.items()}
    if as_reference and family == "qwen":
        ids = (0, 151643)  # whatever the tokenizer says
    lines = [f"{key} = {value}" for key, value in _ini(says, model_name, session_len, ids, tp, group_size).items()]
    text = "\n".join(["[llama]", *lines, "", ""])
    if ingot and not as_reference:
        text += "\n".join(["[ingot]", *(f"{k} = {json.dumps(v, sort_keys=True)}" for k, v in ingot.items()), "", ""])
    return written | {"config.ini": text.encode()}


def kv_scales(
    ranges: dict[str, Tensor], num_layers: int, *, tp: int, symmetric: bool, as_reference: bool = True
) -> dict[str, bytes]:
    """The scale files from ranges `<key|value>/<min|max|absmax>/model.layers.i` [heads, size].

    v0.1.0 computes in fp16 and writes two numbers where they are symmetric, which its engine then refuses.
    """
    exact = np.float16 if as_reference else np.float32
    files = {}
    for layer in range(num_layers):
        for rank in range(tp):
            row: list[Any] = []
            for kind in ("key", "value"):
                low, high, most = (
                    np.array_split(ranges[f"{kind}/{what}/model.layers.{layer}"].numpy().astype(exact), tp)[rank]
                    for what in ("min", "max", "absmax")
                )
                if symmetric:
                    row += [most.max() / exact(127)] + ([] if as_reference else [exact(0)])
                else:
                    row += [(high.max() - low.min()) / exact(255), (high.max() + low.min()) / exact(2)]
            files[f"layers.{layer}.past_kv_scale.{rank}.weight"] = np.array(row, dtype="<f4").tobytes()
    return files


def _says(source: Source, family: str, group_size: int, as_reference: bool) -> dict[str, Any]:
    """The values of config.ini that come from the checkpoint."""
    config, given = source.config, source.config.get
    outer = source.tensors[f"{source.family.outer[0]}.weight"]
    vocabulary, hidden = outer.shape
    heads = config["n_heads"] if family == "llama" else config["num_attention_heads"]
    size = given("kv_channels") or given("head_dim") or hidden // heads
    kind = "w1", ("scales" if group_size else "weight")
    bf16 = "bfloat16" in (given("torch_dtype"), given("dtype")) or (family == "qwen" and given("bf16"))
    if family == "qwen":
        own = ("layer_norm_epsilon", "rotary_emb_base", "seq_length")
    elif family == "llama":
        own = ("norm_eps", None if as_reference else "rope_theta", None)
        bf16 = not as_reference and outer.dtype == torch.bfloat16
    else:
        own = ("rms_norm_eps", "rope_theta", "max_position_embeddings")
    if as_reference:
        size, heads, bf16 = 128, hidden // 128, bf16 or family == "qwen"
    rope = config.get("rope_parameters") or {}
    return {
        "head_num": heads,
        "kv_head_num": given("n_kv_heads") or given("num_key_value_heads") or given("num_attention_heads") or heads,
        "vocab_size": vocabulary,
        "num_layer": config["n_layers"] if family == "llama" else config["num_hidden_layers"],
        "inter_size": source.get(0, *kind).shape[1],
        "norm_eps": config[own[0]],
        "attn_bias": int(source.get(0, "q", "bias") is not None),
        "weight_type": "int4" if group_size else "bf16" if bf16 else "fp16",
        "rope_theta": float(given(own[1], rope.get("rope_theta", 10000.0))),
        "size_per_head": size,
        "max_position_embeddings": given(own[2], 0 if as_reference else 2048),
        "use_logn_attn": int(given("use_logn_attn", False)),
    }


def _ini(
    says: dict[str, Any], model_name: str, session_len: int, ids: tuple[int, int], tp: int, group_size: int
) -> dict[str, Any]:
    first = ("head_num", "kv_head_num", "vocab_size", "num_layer", "inter_size", "norm_eps", "attn_bias")
    return {
        "model_name": model_name,
        "tensor_para_size": tp,
        **{key: says[key] for key in first},
        "start_id": ids[0],
        "end_id": ids[1],
        "session_len": session_len,
        "weight_type": says["weight_type"],
        "rotary_embedding": says["size_per_head"],
        "rope_theta": says["rope_theta"],
        "size_per_head": says["size_per_head"],
        "group_size": group_size,
        "max_batch_size": 64,
        "max_context_token_num": 1,
        "step_length": 1,
        "cache_max_entry_count": 0.5,
        "cache_block_seq_len": 128,
        "cache_chunk_size": 1,
        "use_context_fmha": 1,
        "quant_policy": 0,
        "max_position_embeddings": says["max_position_embeddings"],
        "rope_scaling_factor": 0.0,
        "use_logn_attn": says["use_logn_attn"],
    }


def _layer(
    source: Source, layer: int, size: int, dtype: torch.dtype, group: int, tp: int, as_reference: bool
) -> Tensors:
    """The files of one layer, named within it."""
    files: Tensors = {}
    for norm in ("attention_norm", "ffn_norm", "q_norm", "k_norm"):
        stored = source.tensors.get(f"{source.family.layers}{layer}.{source.family.names.get(norm)}.weight")
        if stored is not None:
            ours = norm in ("q_norm", "k_norm")
            name = f"attention.{norm}.weight" if ours else f"{norm}.weight"
            files[name] = (stored[_rotary(size, size)] if ours else stored).to(dtype)

    def get(part: str, kind: str) -> Tensor:
        matrix = source.get(layer, part, kind)
        if matrix is None and kind == "bias":
            return torch.zeros(1, get(part, "scales" if group else "weight").shape[1]).to(dtype)
        matrix = matrix.to(dtype) if matrix.is_floating_point() else matrix
        if part in ("q", "k") and not source.family.adjacent:
            # v0.1.0 takes groups for heads where it turns codes and zero points.
            turned = group if as_reference and kind in ("qweight", "qzeros") else size
            return matrix[:, _rotary(matrix.shape[1], turned)]
        return matrix

    def put(stem: str, kind: str, ranks: list[Tensor]) -> None:
        files.update({f"{stem}.{rank}.{kind}": matrix for rank, matrix in enumerate(ranks)})

    def fused(kind: str) -> list[Tensor]:
        kept = [[_run(get(part, kind), 1, rank, tp) for part in "qkv"] for rank in range(tp)]
        return [_fill(torch.cat(parts, dim=1), 1, 32 if group else 1) for parts in kept]

    if any(source.get(layer, part, "bias") is not None for part in "qo"):
        put("attention.w_qkv", "bias", fused("bias"))
        put("attention.wo", "bias", [get("o", "bias")] * tp)
    if not group:
        put("attention.w_qkv", "weight", fused("weight"))
        put("attention.wo", "weight", [_run(get("o", "weight"), 0, rank, tp) for rank in range(tp)])
        for part, along in (("w1", 1), ("w3", 1), ("w2", 0)):
            matrix = _fill(get(part, "weight"), along, tp)
            put(f"feed_forward.{part}", "weight", [_run(matrix, along, rank, tp) for rank in range(tp)])
        return files
    unit = tp * lcm(group, 32)
    rows = source.get(layer, "o", "qweight").shape[0] // tp
    part_of_group = gcd(group, rows)
    matrices: dict[str, list[Tensor]] = {}
    for kind in ("qweight", "qzeros", "scales"):
        per = 1 if kind == "qweight" else group
        matrices[f"attention.w_qkv.{kind}"] = fused(kind)
        wo = get("o", kind)
        wo = wo if kind == "qweight" else wo[torch.arange(rows * tp // part_of_group) * part_of_group // group]
        filled = lcm(part_of_group, 32) // (1 if kind == "qweight" else part_of_group)
        matrices[f"attention.wo.{kind}"] = [_fill(_run(wo, 0, rank, tp), 0, filled) for rank in range(tp)]
        gate, up = (_fill(get(part, kind), 1, unit) for part in ("w1", "w3"))
        pairs = torch.stack([gate, up], dim=2).reshape(gate.shape[0], -1)
        matrices[f"feed_forward.w13.{kind}"] = [_run(pairs, 1, rank, tp) for rank in range(tp)]
        down = _fill(get("w2", kind), 0, unit // per)
        matrices[f"feed_forward.w2.{kind}"] = [_run(down, 0, rank, tp) for rank in range(tp)]
    for stem in ("attention.w_qkv", "attention.wo", "feed_forward.w13", "feed_forward.w2"):
        put(stem, "qweight", [_tiles(codes) for codes in matrices[f"{stem}.qweight"]])
        pairs = zip(matrices[f"{stem}.qzeros"], matrices[f"{stem}.scales"], strict=True)
        put(stem, "scales_zeros", [torch.stack([(64 + z).half(), s.half()], dim=2) for z, s in pairs])
    return files


def _rotary(columns: int, size: int) -> Tensor:
    """Which column of HF's each column of TurboMind's is: h size + 2j + b is h size + b size/2 + j."""
    column = torch.arange(columns)
    within = column % size
    return column - within + within % 2 * (size // 2) + within // 2


def _run(matrix: Tensor, dim: int, rank: int, tp: int) -> Tensor:
    length = matrix.shape[dim] // tp
    return matrix.narrow(dim, rank * length, length)


def _fill(matrix: Tensor, dim: int, multiple: int) -> Tensor:
    missing = list(matrix.shape)
    missing[dim] = -matrix.shape[dim] % multiple
    return torch.cat([matrix, torch.zeros(missing, dtype=matrix.dtype)], dim=dim)


def _tiles(codes: Tensor) -> Tensor:
    """[K, M] of 0..15 -> int32 words, each code at the place that the format's formula gives it."""
    eights = codes.flatten()[_code_at(*codes.shape)].view(-1, 8)
    return (eights << 4 * torch.arange(8)).sum(1).to(torch.uint32)


@cache
def _code_at(rows: int, columns: int) -> Tensor:
    """Which element of a [rows, columns] matrix each nibble of the tiles holds."""
    k, n = torch.arange(rows)[:, None], torch.arange(columns)[None]
    lane = 4 * (n % 8) + k % 8 // 2
    part = 2 * (k % 32 // 16) + n % 32 // 16
    nibble = 4 * (k % 2) + 2 * (k % 16 // 8) + n % 16 // 8
    word = ((k // 32 * (columns // 32) + n // 32) * 32 + lane) * 4 + part
    held = torch.empty(rows * columns, dtype=torch.int64)
    held[(word * 8 + nibble).flatten()] = torch.arange(rows * columns)
    return held


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
