"""The stage `quantize`: from a checkpoint and its calibration to the weights of a recipe.

`source.json` says what the weights come from: {"source": the source's identity, "files": {name: SHA-256}}. Beside it
lies what the recipe's package writes: nothing for `fp16`, a report for `as_is`.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from pipelines.devices import check_device
from pipelines.quantized_source import check_weights
from pipelines.slices import Call, locate, output, run_stage, write_json
from pipelines.sources import identity, model_files, pickled, sha256_file
from pipelines.unfinished import unfinished_work

SOURCE = "source.json"
RECIPES = ("fp16", "w8a8", "w4a16", "as_is")
TAKEN = ("fp16", "as_is")  # from the checkpoint, with nothing computed


def work(call: Call) -> None:
    check_device(call.device)
    record, weights = call.slice["model"], call.slice["weights"]
    if weights["name"] not in RECIPES:
        raise ValueError(f"weights={weights['name']} is no recipe; there are {', '.join(RECIPES)}.")
    # By name, so that a change of one recipe's code rebuilds that recipe alone.
    recipe = importlib.import_module(f"pipelines.quant.{weights['name']}")
    folder, name = locate(record), weights["name"]
    check_weights(folder, name)
    with ExitStack() as around:
        unfinished: Path | None = None
        if name not in TAKEN:
            around.enter_context(_forecast(call, folder))
            unfinished = around.enter_context(unfinished_work(call, "quantize", name))
        out = around.enter_context(output(call.out))
        recipe.quantize(
            weights,
            folder,
            call.inputs["calibrate"],
            out,
            allow_bin=pickled(record),
            device=call.device,
            unfinished=unfinished,
        )
        files = {path.name: sha256_file(path) for path in model_files(folder, allow_bin=pickled(record))}
        write_json(out / SOURCE, {"source": identity(record), "files": files})


def _forecast(call: Call, source: Path) -> AbstractContextManager[None]:
    # Torch takes seconds to import, and weights that are taken as they are do not need it.
    from safetensors import safe_open

    from engine.storage.checkpoint import Checkpoint
    from pipelines.forecast import forecast, load_of
    from pipelines.quant.cost import quantization_cost

    config = Checkpoint(source, allow_bin=pickled(call.slice["model"])).config
    with safe_open(call.inputs["calibrate"] / "blocks.safetensors", framework="pt") as opened:
        samples, length = opened.get_slice("tokens").get_shape()
    load = load_of(config, samples, length, call.device)
    return forecast(
        call, "quantize", load, lambda some, weights: quantization_cost(config, weights, some), call.slice["weights"]
    )


if __name__ == "__main__":
    raise SystemExit(run_stage(work, on_gpus=True))
