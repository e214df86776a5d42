"""The stage `export`: linked weight files, config.ini, KV scales, tokenizer, Triton's model repository and manifest.

Prints the artifact's id.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from engine.config import ModelConfig, Recipe
from engine.models import names
from engine.runtime.tokenizer import Tokenizer
from engine.storage.artifacts import write_manifest
from engine.storage.checkpoint import Checkpoint
from engine.storage.config_ini import weight_type_of, write_config_ini
from engine.storage.kv_scale_files import write_kv_scales, write_layer_scales
from engine.storage.triton_repository import write_repository
from engine.storage.workspace import CONFIG_INI, TOKENIZER, WEIGHTS
from pipelines.chat_templates import open_tokenizer, write_template
from pipelines.quant.kv import fine_scales, layer_scales
from pipelines.slices import Call, locate, output, run_stage
from pipelines.sources import pickled, small_files
from pipelines.template_files import OWN
from pipelines.token_ids import with_token_ids
from pipelines.written_weights import link_weights


def work(call: Call) -> None:
    content, inputs = call.slice, call.inputs
    source, recipe, tp = locate(content["model"]), Recipe(**content["recipe"]), content["tp"]
    as_is = recipe.weights == "as_is"
    checkpoint = Checkpoint(source, allow_bin=pickled(content["model"]), allow_quantized=as_is)
    config = checkpoint.config
    if as_is:
        recipe = replace(checkpoint.recipe, kv=recipe.kv, kv_granularity=recipe.kv_granularity)
    with output(call.out) as folder:
        weights = folder / WEIGHTS
        weights.mkdir(parents=True)
        written = link_weights(inputs["shard"], folder, within=WEIGHTS)
        tokenizer = copy_tokenizer(source, folder / TOKENIZER, content.get("template"))
        write_config_ini(
            weights / CONFIG_INI,
            with_token_ids(config, tokenizer),
            model_name=content["name"],
            recipe=recipe,
            tp=tp,
            session_len=content["session_len"] or config.max_position_embeddings,
            weight_type=weight_type_of(config, recipe),
            extra=content.get("ini"),
        )
        if recipe.kv == "kv8" and recipe.kv_granularity != "token":
            write_scales(weights, config, inputs["calibrate"], inputs["quantize"], tp=tp, kv=content["kv"])
        write_repository(folder, model_name=content["name"], tp=tp)
        artifact = write_manifest(
            folder,
            recipe=recipe,
            sources=json.loads((inputs["quantize"] / "source.json").read_text(encoding="utf-8"))["files"],
            calibration=calibrated_on(content["calibration"], inputs["calibrate"]),
            chat_template=digest_of(tokenizer.chat_template),
            tp=tp,
            written=written,
        )
    print(artifact)


def write_scales(
    weights: Path, config: ModelConfig, calibration: Path, quantized: Path, *, tp: int, kv: dict[str, Any]
) -> None:
    """The scales of int8 K and V of every layer, V's for the smoothed v_proj where there is one."""
    statistics = load_file(calibration / "stats.safetensors")
    smoothed = quantized / "smoothing.safetensors"
    smoothing = load_file(smoothed) if smoothed.is_file() else {}
    for layer in range(config.num_layers):
        divisor = smoothing.get(names.layer_name(layer, "self_attn.v_proj"))
        granularity, options = kv["granularity"], {"smoothing": divisor, "symmetric": kv["symmetric"]}
        if granularity == "tensor":
            write_kv_scales(weights, layer, layer_scales(statistics, layer, tp=tp, **options))
        else:
            scales = fine_scales(statistics, layer, granularity, **options)
            write_layer_scales(weights, layer, scales, granularity=granularity, tp=tp)


def calibrated_on(declared: str | None, calibration: Path) -> dict[str, str] | None:
    """The digests by which a manifest names a calibration: what was declared of it, and what it came to."""
    if declared is None:
        return None
    about = json.loads((calibration / "calibration.json").read_text(encoding="utf-8"))
    named = {name: about[name] for name in ("blocks", "tokenizer", "template") if about[name] is not None}
    return {"declared": declared, **named}


def copy_tokenizer(source: Path, target: Path, template: str | None) -> Tokenizer:
    """Copy everything of a checkpoint but its weights; a named template takes the place of the checkpoint's own.

    ValueError where the checkpoint has no tokenizer: nothing could be served from the artifact.
    """
    tokenizer = open_tokenizer(source, template)
    target.mkdir(parents=True)
    for path in small_files(source):
        shutil.copyfile(path, target / path.name)
    if template not in (None, OWN):
        write_template(tokenizer, target)
    return tokenizer


def digest_of(chat_template: str | None) -> str | None:
    """The SHA-256 of a chat template; None for none."""
    return None if chat_template is None else hashlib.sha256(chat_template.encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
