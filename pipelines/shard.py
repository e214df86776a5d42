"""The stage `shard`: the TurboMind weight files of a model, cut for `tp` ranks, and their digests.

No config.ini and no KV scales.
"""

from __future__ import annotations

from typing import Any

from engine.config import Recipe
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.tensor_file import tensors_over
from pipelines.slices import Call, locate, output, run_stage
from pipelines.sources import pickled
from pipelines.written_weights import keep_digests, write_with_bar


def work(call: Call) -> None:
    record, weights, tp = call.slice["model"], call.slice["weights"], call.slice["tp"]
    as_is = weights["name"] == "as_is"
    checkpoint = Checkpoint(locate(record), allow_bin=pickled(record), allow_quantized=as_is)
    quantized = call.inputs["quantize"]
    tensor = tensors_over(quantized / "weights.safetensors", checkpoint.tensor)
    if "head" in weights:
        tensor = tensors_over(quantized / "head.safetensors", tensor)
    recipe = checkpoint.recipe if as_is else recipe_of(weights)
    with output(call.out) as folder:
        entries = write_with_bar(folder, checkpoint.config, tensor, recipe=recipe, tp=tp, title="shard")
        keep_digests(folder, entries)


def recipe_of(weights: dict[str, Any]) -> Recipe:
    """What the part `weights` of the slice asks for."""
    return Recipe(
        weights=weights["name"],
        group_size=weights["group_size"],
        head=weights.get("head", "fp16"),
        rotate_down=weights.get("rotate_down", 0),
    )


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
