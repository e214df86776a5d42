"""KV scales from calibration's statistics into a plain workspace, and int8 KV switched on there."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from engine.models import names
from engine.storage.artifacts import MANIFEST
from engine.storage.config_ini import read_config_ini
from engine.storage.ini_edit import write_with_value, write_without
from engine.storage.ini_keys import KV_INT8
from engine.storage.kv_scale_files import channels_file, runs_file, write_kv_scales
from engine.storage.workspace import CONFIG_INI, WEIGHTS
from pipelines.quant.kv import layer_scales

STATISTICS = "stats.safetensors"
SMOOTHING = "smoothing.safetensors"
KV_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written: a row (layer, rank, k_scale, k_zero, v_scale, v_zero) a file, and what to know about it."""

    rows: list[tuple[int, int, float, float, float, float]]
    config_ini: Path | None
    warning: str | None


def write_kv_qparams(
    work_folder: Path, weights: Path, *, bits: int = KV_BITS, symmetric: bool = False, tp: int = 1
) -> Written:
    """Write `layers.*.past_kv_scale.*.weight` into the folder of weights, and `quant_policy = 4` into its config.ini.

    `work_folder` holds calibration's stats.safetensors, and the quantized weights' smoothing.safetensors where V was
    smoothed. Scales that are finer than the reference's give way to these. Without a config.ini in `weights`, scales
    alone are written. Every file is replaced as a whole; config.ini is the last. ValueError or FileNotFoundError before
    a byte is written.
    """
    if bits != KV_BITS:
        raise ValueError(f"--kv-bits {bits} is not supported: keys and values are cached in 8 bits or as computed")
    statistics_file = work_folder / STATISTICS
    if not statistics_file.is_file():
        pickled = ": its *.pth are pickled files of another program" if list(work_folder.glob("*.pth")) else ""
        raise FileNotFoundError(f"{work_folder} has no {STATISTICS}{pickled}. Calibrate the model with Ingot first")
    if not weights.is_dir():
        raise FileNotFoundError(f"{weights} is not a folder: give the folder of the weight files, WORKSPACE/{WEIGHTS}")
    if any((folder / MANIFEST).is_file() for folder in [weights.resolve(), *weights.resolve().parents[:2]]):
        raise ValueError(f"{weights} belongs to an artifact, which does not change: build one with kv=kv8 instead")
    statistics = load_file(statistics_file)
    smoothed = work_folder / SMOOTHING
    smoothing = load_file(smoothed) if smoothed.is_file() else {}
    num_layers = sum(name.startswith("key/min/") for name in statistics)
    config_ini, warning = weights / CONFIG_INI, None
    if config_ini.is_file():
        ini = read_config_ini(config_ini)
        heads = len(statistics["key/min/model.layers.0"]) if num_layers else 0
        if (ini.num_layer, ini.kv_head_num) != (num_layers, heads):
            raise ValueError(
                f"{statistics_file} is of a model of {num_layers} layers with {heads} KV heads; {config_ini} says "
                f"{ini.num_layer} layers with {ini.kv_head_num}"
            )
        if ini.tensor_para_size != tp:
            raise ValueError(f"--num-tp {tp} does not go with tensor_para_size {ini.tensor_para_size} of {config_ini}")
        if ini.weight_type == "int4" and not smoothing:
            warning = (
                f"the weights are int4, and {work_folder} has no {SMOOTHING}: where v_proj was smoothed, V's range is "
                "not the one that was calibrated and these scales do not fit"
            )
    rows = []
    with tempfile.TemporaryDirectory(prefix=f".kv-{os.getpid()}-", dir=weights) as temporary:
        for layer in range(num_layers):
            divisor = smoothing.get(names.layer_name(layer, "self_attn.v_proj"))
            scales = layer_scales(statistics, layer, tp=tp, smoothing=divisor, symmetric=symmetric)
            write_kv_scales(Path(temporary), layer, scales)
            rows += [(layer, rank, *row) for rank, row in enumerate(scales)]
        for layer in range(num_layers):
            for finer in (runs_file(layer), channels_file(layer)):
                (weights / finer).unlink(missing_ok=True)
        for path in Path(temporary).iterdir():
            path.replace(weights / path.name)
    if config_ini.is_file():
        write_without(config_ini, config_ini, "kv_granularity")
        write_with_value(config_ini, config_ini, "quant_policy", KV_INT8)
    return Written(rows=rows, config_ini=config_ini if config_ini.is_file() else None, warning=warning)
