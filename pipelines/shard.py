"""The stage `shard`: the TurboMind weight files of a model, cut for `tp` ranks; no config.ini and no KV scales."""

from __future__ import annotations

from engine.config import Recipe
from engine.storage.checkpoint import Checkpoint
from engine.storage.workspace import write_weights
from pipelines.quant.tensor_file import tensors_over
from pipelines.slices import Call, locate, output, run_stage


def work(call: Call) -> None:
    weights, tp = call.slice["weights"], call.slice["tp"]
    checkpoint = Checkpoint(locate(call.slice["model"]))
    tensor = tensors_over(call.inputs["quantize"] / "weights.safetensors", checkpoint.tensor)
    recipe = Recipe(weights=weights["name"], group_size=weights["group_size"])
    with output(call.out) as folder:
        write_weights(folder, checkpoint.config, tensor, recipe=recipe, tp=tp)


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
