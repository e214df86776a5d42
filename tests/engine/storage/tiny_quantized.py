"""Checkpoints that are quantized already, written without the code of the project: by hand, and by compressed-tensors'
own compressor."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble p of a word holds output 8c + AWQ_NIBBLES[p]


def round_to_groups(weight, group_size, *, symmetric=False, dtype=torch.float16):
    """Codes and zero points (0..15, int) [out, in] and [out, groups], and scales, of a weight."""
    out, inputs = weight.shape
    grouped = weight.float().view(out, inputs // group_size, group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        scales = (torch.maximum(-low, high) / 7.5).to(dtype)
        zeros = torch.full_like(scales, 8, dtype=torch.int64)
    else:
        scales = ((high - low) / 15).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, 15).long()
    codes = (grouped / scales.float()[..., None]).round().long() + zeros[..., None]
    return codes.clamp(0, 15).view(out, inputs), zeros, scales


def dequantize(codes, zeros, scales):
    out, inputs = codes.shape
    steps = codes.view(out, zeros.shape[1], -1) - zeros[..., None]
    return (steps.float() * scales.float()[..., None]).reshape(out, inputs)


def as_words(values, order):
    """Integers 0..15 [rows, 8n] as int32 [rows, n], nibble p holding value 8c + order[p]."""
    lanes = values.view(values.shape[0], -1, 8)[..., list(order)]
    words = sum(lanes[..., p] << (4 * p) for p in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def read_words(words, order):
    """`as_words` read backwards."""
    values = torch.empty(*words.shape, 8, dtype=torch.int64)
    for p, place in enumerate(order):
        values[..., place] = (words.long() >> (4 * p)) & 15
    return values.flatten(-2)


def awq_linear(codes, zeros, scales):
    return {
        "qweight": as_words(codes.t().contiguous(), AWQ_NIBBLES),
        "qzeros": as_words(zeros.t().contiguous(), AWQ_NIBBLES),
        "scales": scales.t().contiguous(),
    }


def packed_linear(codes, zeros, scales, *, symmetric=False):
    tensors = {
        "weight_packed": as_words(codes, range(8)),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = as_words(zeros.t().contiguous(), range(8)).t().contiguous()
    return tensors


def read_linear(tensors, module):
    """The dense weight of a linear in either form."""
    if f"{module}.qweight" in tensors:
        codes, zeros = (read_words(tensors[f"{module}.{kind}"], AWQ_NIBBLES).t() for kind in ("qweight", "qzeros"))
        return dequantize(codes.contiguous(), zeros.contiguous(), tensors[f"{module}.scales"].t())
    codes = read_words(tensors[f"{module}.weight_packed"], range(8))
    scales = tensors[f"{module}.weight_scale"]
    zeros = torch.full(scales.shape, 8)
    if f"{module}.weight_zero_point" in tensors:
        zeros = read_words(tensors[f"{module}.weight_zero_point"].t().contiguous(), range(8)).t().contiguous()
    return dequantize(codes, zeros, scales)


def awq_config(group_size, **changes):
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"} | changes


def packed_config(group_size, *, symmetric=False, weights=None, **changes):
    """As llm-compressor writes it."""
    args = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    } | (weights or {})  # fmt: skip
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.9.4",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.9,
        "sparsity_config": {},
        "transform_config": {},
    } | changes


def scheme(strategy, **changes):
    """8 bits, as llm-compressor writes it."""
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False} | changes


def int8_config(**changes):
    group = {
        "targets": ["Linear"],
        "weights": scheme("channel", observer="minmax", group_size=None),
        "input_activations": scheme("token", dynamic=True, observer=None),
        "output_activations": None,
    } | changes
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def quantize_folder(folder: Path, *, form="awq", group_size=32, symmetric=False, dtype=torch.float16):
    """Quantize every matrix of the layers of a checkpoint in place; returns their dense weights by stored name."""
    tensors = load_file(folder / "model.safetensors")
    dense = {}
    for name in [name for name in tensors if name.endswith(".weight") and (".layers." in name or ".h." in name)]:
        if tensors[name].dim() != 2:
            continue
        codes, zeros, scales = round_to_groups(tensors.pop(name), group_size, symmetric=symmetric, dtype=dtype)
        dense[name] = dequantize(codes, zeros, scales)
        packed = packed_linear(codes, zeros, scales, symmetric=symmetric)
        linear = awq_linear(codes, zeros, scales) if form == "awq" else packed
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in linear.items()}
    save_file(tensors, folder / "model.safetensors")
    say(folder, awq_config(group_size) if form == "awq" else packed_config(group_size, symmetric=symmetric))
    return dense


def say(folder: Path, quantization_config):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))
