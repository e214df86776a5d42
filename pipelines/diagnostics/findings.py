"""What there is to see of a quantized artifact: errors per layer, outliers, ranges of K and V, what was left as it was.

Read from what the stages leave in build/; the checkpoint is read as well where it is on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.config import ModelConfig
from engine.models import names
from engine.storage.artifacts import Manifest, read_manifest
from engine.storage.checkpoint import Checkpoint
from engine.storage.workspace import Workspace
from pipelines.difference import scale_free_layer
from pipelines.forecast import RUNS
from pipelines.provenance import stage_keys
from pipelines.quant.pairs import ATTENTION_OUT, repeat_heads
from pipelines.quant.walk import ORDER
from pipelines.slices import PATHS, locate, read_slice
from pipelines.sources import pickled

LEVELS = 255  # steps of an int8


@dataclass(slots=True, kw_only=True)
class Findings:
    """All that the page shows. Lists have one entry a layer; NaN stands for what cannot be known here.

    `errors` are the rows of the recipe's report.json; `outliers` by pair (before, after scaling): the largest input
    channel in parts of the median one; `weights` by linear: the error of the weights in parts of their norm, scales
    that cancel out taken out; `head` is what head.json says of the output matrix; `levels` by (K or V) and what shares
    a scale: the steps of int8, of 255, that the median and the smallest channel use; `unquantized`: linears whose
    weights are as they were.
    """

    key: str
    manifest: Manifest
    config: ModelConfig
    options: dict[str, Any]
    errors: list[dict[str, Any]]
    outliers: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    levels: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    statement: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def collect(root: Path, key: str) -> Findings:
    """The findings of the artifact `model-calibration-weights-tp-kv` under root/build.

    FileNotFoundError where it is not built as far as `export`.
    """
    build, keys = root / "build", stage_keys(key)
    export, quantized = build / "export" / key, build / "quantize" / keys["quantize"]
    calibrated = build / "calibrate" / keys["calibrate"]
    for stage, folder in (("export", export), ("quantize", quantized), ("calibrate", calibrated)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{key} is not built as far as {stage}: run `dvc repro export@{key}`.")
    workspace, report = Workspace(export), _read(quantized / "report.json")
    slices = {stage: _read(build / "slices" / stage / f"{name}.json") for stage, name in keys.items()}
    findings = Findings(
        key=key,
        manifest=read_manifest(export),
        config=workspace.config,
        options={**slices["quantize"].get("weights", {}), "kv": slices["export"].get("kv")},
        errors=[row for row in report.get("pairs", ()) if "skipped" not in row],
        calibration=_read(calibrated / "calibration.json"),
        head=_read(quantized / "head.json"),
        runs={stage: run for stage, name in keys.items() if (run := _read(build / RUNS / stage / f"{name}.json"))},
        statement=_read(build / "evaluate" / key / "statement.json").get("predicate"),
    )
    for row in report.get("pairs", ()):
        if "skipped" in row:
            findings.notes.append(f"Layer {row['layer']}: {row['pair']} was not scaled ({row['skipped']}).")
    quantizes = workspace.recipe.weights != "fp16"
    findings.unquantized = list(_unquantized(workspace)) if quantizes else []
    _kv_levels(findings, calibrated / "stats.safetensors", quantized / "smoothing.safetensors")
    if quantizes and report.get("pairs") is not None:
        checkpoint = _source(root, slices["quantize"], findings)
        if checkpoint is not None:
            _beside_the_source(findings, workspace, checkpoint, calibrated, quantized)
    return findings


def _unquantized(workspace: Workspace) -> Iterator[str]:
    """Linears of decoder layers that are floats although the recipe quantizes."""
    held = set(workspace.names())
    for layer in range(workspace.config.num_layers):
        for module in names.LINEARS:
            name = names.layer_name(layer, module)
            if f"{name}.qweight" not in held and f"{name}.{names.WEIGHT_SCALE}" not in held:
                yield name


def _source(root: Path, content: Mapping[str, Any], findings: Findings) -> Checkpoint | None:
    try:
        record = content["model"]
        folder = locate(record, paths=root / PATHS)
        return Checkpoint(folder, allow_bin=pickled(record))
    except (OSError, ValueError, KeyError) as error:
        findings.notes.append(f"Weights and outliers are not compared with the checkpoint, which is not here: {error}")
        return None


@torch.inference_mode()
def _beside_the_source(
    findings: Findings, workspace: Workspace, checkpoint: Checkpoint, calibrated: Path, quantized: Path
) -> None:
    config, source, built = workspace.config, checkpoint.weights(), workspace.weights()
    with (
        safe_open(calibrated / "stats.safetensors", framework="pt") as statistics,
        safe_open(quantized / "smoothing.safetensors", framework="pt") as smoothing,
    ):
        smoothed = set(smoothing.keys())
        for layer in range(config.num_layers):
            wanted, found = (scale_free_layer(config, weights, layer) for weights in (source, built))
            for module, tensor in wanted.items():
                norm = float(tensor.norm()) or 1.0
                findings.weights.setdefault(module, []).append(float((found[module] - tensor).norm()) / norm)
            for pair in ORDER:
                before = statistics.get_tensor(f"inputs/absmax/{names.layer_name(layer, pair.after[0])}")
                name = names.layer_name(layer, pair.before)
                scale = torch.ones_like(before)
                if pair.before in names.NORMS:
                    quotient = source[f"{name}.weight"].float() / built[f"{name}.weight"].float()
                    scale = torch.where(quotient.isfinite() & (quotient != 0), quotient.abs(), scale)
                elif name in smoothed:
                    divisor = smoothing.get_tensor(name)
                    scale = repeat_heads(divisor, config) if pair is ATTENTION_OUT else divisor
                findings.outliers.setdefault(pair.name, []).append((_outlier(before), _outlier(before / scale)))


def _kv_levels(findings: Findings, statistics: Path, smoothing: Path) -> None:
    """Of K and V, with a scale a layer and with a scale a head: the steps that the median and smallest channel use."""
    divisors: dict[str, Tensor] = {}
    if smoothing.is_file():
        with safe_open(smoothing, framework="pt") as opened:
            divisors = {name: opened.get_tensor(name) for name in list(opened.keys()) if name.endswith("v_proj")}
    with safe_open(statistics, framework="pt") as opened:
        for layer in range(findings.config.num_layers):
            for what, kind in (("K", "key"), ("V", "value")):
                low, high = (opened.get_tensor(f"{kind}/{end}/model.layers.{layer}") for end in ("min", "max"))
                divisor = divisors.get(names.layer_name(layer, "self_attn.v_proj")) if what == "V" else None
                if divisor is not None:
                    low, high = low / divisor.view(low.shape), high / divisor.view(high.shape)
                width = high - low
                for shared, whole in (("layer", high.max() - low.min()), ("head", high.amax(1) - low.amin(1))):
                    used = LEVELS * width / whole.clamp(min=1e-30).view(-1, 1)
                    entry = (float(used.median()), float(used.min()))
                    findings.levels.setdefault((what, shared), []).append(entry)


def _outlier(absmax: Tensor) -> float:
    """The largest channel in parts of the median one."""
    median = float(absmax.median())
    return float(absmax.max()) / median if median > 0 else float("nan")


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    return read_slice(path) if path.is_file() else {}
