"""The stage `evaluate`: an artifact, through the engine that will serve it, against the baseline on the same items.

Writes `statement.json` (metrics, gates, verdict) and `goldens.json`, both canonical JSON, whatever the verdict: a
failing gate is an outcome, not a crash.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.models.cache import PerToken, page_bytes
from engine.runtime.capability import check_capability, probe_device
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.artifacts import canonical_json, verify
from engine.storage.workspace import Workspace, load_workspace
from pipelines.data.calibration_set import blocks_digest
from pipelines.evaluation import metrics
from pipelines.evaluation.gates import judge
from pipelines.evaluation.goldens import NUM_TOKENS, choose_prompts, record_goldens
from pipelines.evaluation.kept import Baseline, read_baseline
from pipelines.evaluation.overlap import calibration_overlap
from pipelines.evaluation.statement import make_statement
from pipelines.slices import Call, output, run_stage


def work(call: Call) -> None:
    baseline = read_baseline(call.inputs["baseline"])
    statement, goldens = evaluate(call.inputs["export"], baseline, call.slice, calibration=call.inputs["calibrate"])
    with output(call.out) as folder:
        (folder / "statement.json").write_bytes(canonical_json(statement))
        (folder / "goldens.json").write_bytes(canonical_json(goldens))


def evaluate(
    folder: Path, baseline: Baseline, content: dict[str, Any], *, calibration: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The statement about the artifact in `folder`, and its goldens. `content` is the slice.

    `calibration` is the folder of the calibration that the artifact names; of one that names none it is not read.
    """
    evaluation, toolchain = content["evaluation"], content["toolchain"]
    manifest, workspace = verify(folder), Workspace(folder)
    tokenizer = Tokenizer(workspace.tokenizer_folder)
    prompts = choose_prompts(baseline, tokenizer)
    session_len = max(baseline.longest, *(len(ids) + NUM_TOKENS for ids in prompts.values()))
    options = EngineConfig()
    check_capability(workspace.config, workspace.recipe, options, probe_device(options.device), session_len=session_len)
    model, scales = load_workspace(folder, device="cpu", dtype=torch.float32), workspace.kv_scales()
    engine = Engine(model, tokenizer, options, session_len=session_len, kv_scales=scales)

    candidate = metrics.ask(engine, baseline)
    bounds = dict(evaluation["gates"])
    confidence = bounds.pop("confidence")
    measured = metrics.estimates(candidate, baseline, confidence=confidence)
    gates = judge(bounds, measured)
    goldens = record_goldens(
        engine,
        model,
        scales,
        prompts,
        artifact=manifest.id,
        recipe=manifest.recipe,
        device_class=toolchain["device"],
    )
    statement = make_statement(
        artifact=manifest.id,
        name=evaluation["name"],
        recipe=manifest.recipe.fields(),
        baseline=baseline.weights,
        toolchain=toolchain,
        items=baseline.digest,
        counts={
            "num_items": len(baseline.items),
            "num_tokens": len(baseline.losses),
            "num_questions": len(baseline.questions),
        },
        confidence=confidence,
        metrics=measured,
        flips=metrics.flips(candidate, baseline) if baseline.questions else None,
        sizes={
            "checkpoint_weight_bytes": baseline.weight_bytes,
            "artifact_bytes": manifest.size,
            "kv_bytes_per_token": page_bytes(
                model.config,
                page_len=1,
                dtype=torch.float16,
                quantized=scales is not None,
                per_token=isinstance(scales, PerToken),
            ),
        },
        gates=gates,
        goldens=hashlib.sha256(canonical_json(goldens)).hexdigest(),
        calibration=None if manifest.calibration is None else _overlap(manifest.calibration, calibration, baseline),
    )
    return statement, goldens


def _overlap(named: Mapping[str, str], calibration: Path, baseline: Baseline) -> dict[str, Any]:
    """What of the scored tokens the artifact was calibrated on, said on stderr too where that is notable."""
    blocks = load_file(calibration / "blocks.safetensors")["tokens"]
    if blocks_digest(blocks) != named["blocks"]:
        raise ValueError(f"{calibration} is not the calibration that the artifact names: run `dvc repro` again.")
    found = calibration_overlap((block.tolist() for block in blocks), baseline.items)
    if found.notable:
        print(f"evaluate: {found.warning()}", file=sys.stderr)
    return {"blocks": named["blocks"], **asdict(found)}


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
