"""The same model for another number of tensor-parallel ranks: nothing is quantized again, no weight changes a bit."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from engine.models.cache import KVScales
from engine.storage.artifacts import MANIFEST, FileEntry, list_files, read_manifest, write_manifest
from engine.storage.ini_edit import write_with_value
from engine.storage.kv_scale_files import layer_of, write_layer_scales
from engine.storage.workspace import CONFIG_INI, WEIGHTS, Workspace, write_weights

TRITON_CONFIG = "config.pbtxt"
RANKS_FOR_TRITON = re.compile(r'(key:\s*"tensor_para_size"\s*value:?\s*\{\s*string_value:\s*)"\d+"')


def reshard(source: Path, target: Path, tp: int) -> list[FileEntry]:
    """Write the workspace `source` for `tp` ranks into the new folder `target`, without a manifest.

    Returns the weight files that it wrote. Everything but weight files, KV scales and `tensor_para_size` (config.ini's
    and Triton's) is copied as it is. Scales of merged ranks are all kept, so that every KV head has the same ones at
    any tp. ValueError where the heads cannot be dealt to `tp` ranks.
    """
    workspace = Workspace(source)
    weights, scales = target / WEIGHTS, workspace.kv_scales()
    written = write_weights(weights, workspace.config, workspace.tensor, recipe=workspace.recipe, tp=tp)
    write_with_value(source / WEIGHTS / CONFIG_INI, weights / CONFIG_INI, "tensor_para_size", tp)
    if isinstance(scales, KVScales):
        granularity = workspace.recipe.kv_granularity
        for layer in range(workspace.config.num_layers):
            write_layer_scales(weights, layer, layer_of(scales, layer), granularity=granularity, tp=tp)
    for name in list_files(source)[0]:
        if name != MANIFEST and WEIGHTS not in Path(name).parents:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
            if Path(name).name == TRITON_CONFIG:
                text = (target / name).read_text(encoding="utf-8")
                (target / name).write_text(RANKS_FOR_TRITON.sub(rf'\g<1>"{tp}"', text), encoding="utf-8")
    return [replace(entry, path=(WEIGHTS / entry.path).as_posix()) for entry in written]


def reshard_artifact(source: Path, target: Path, tp: int) -> str:
    """Write the artifact `source` for `tp` ranks into the new folder `target` and return its id.

    Recipe, sources, calibration and chat template are those of `source`.
    """
    manifest = read_manifest(source)
    written = reshard(source, target, tp)
    return write_manifest(
        target,
        recipe=manifest.recipe,
        sources=manifest.sources,
        calibration=manifest.calibration,
        chat_template=manifest.chat_template,
        tp=tp,
        written=written,
    )
