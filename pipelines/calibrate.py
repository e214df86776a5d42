"""The stage `calibrate`: what flows through the unquantized model on the calibration text, in three files.

`stats.safetensors`: float32 `inputs/<min|max|mean|absmax|absmean>/<linear>` [in] of every linear, and
`<key|value>/<min|max|absmax>/model.layers.<i>` [kv_heads, head_dim] with K after rotary. `blocks.safetensors`:
`tokens` int32 [samples, sequence_length], the blocks that it was measured on. `calibration.json`: what these are, by
digests of the blocks, the tokenizer, the chat template and the texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.storage.checkpoint import Checkpoint
from pipelines.chat_templates import open_tokenizer
from pipelines.data.calibration_set import calibration_set
from pipelines.devices import check_device
from pipelines.forecast import forecast, load_of
from pipelines.quant.cost import calibration_cost
from pipelines.quant.observers import KEY, VALUE, Observer, channel_statistics, head_statistics, with_means
from pipelines.quant.resume import LayerResult, Resume
from pipelines.quant.stream import LayerTensors, Stream, Workers, side_by_side
from pipelines.slices import Call, locate, output, run_stage, write_json
from pipelines.sources import pickled
from pipelines.unfinished import unfinished_work


def work(call: Call) -> None:
    check_device(call.device)
    record = call.slice["model"]
    checkpoint = Checkpoint(locate(record), allow_bin=pickled(record), allow_quantized=True)
    calibration, config = call.slice["calibration"], checkpoint.config
    load = load_of(config, calibration["samples"], calibration["sequence_length"], call.device)
    with forecast(call, "calibrate", load, lambda some, _: calibration_cost(config, some), {}):
        blocks, about = calibration_blocks(calibration, checkpoint, call.slice.get("template"))
        with (
            unfinished_work(call, "calibrate") as unfinished,
            output(call.out) as folder,
            side_by_side(device=call.device) as workers,
        ):
            save_file({"tokens": blocks}, folder / "blocks.safetensors")
            write_json(folder / "calibration.json", about)
            save_file(calibrate(checkpoint, blocks, workers, call.device, unfinished), folder / "stats.safetensors")


def calibration_blocks(
    calibration: dict[str, Any],
    checkpoint: Checkpoint,
    template: str | None = None,
    *,
    locate: Callable[[Mapping[str, Any]], Path] = locate,
) -> tuple[Tensor, dict[str, Any]]:
    """The token blocks of a slice's calibration, and what calibration.json says of them.

    ValueError where they do not fit the model or the text. `template` is what the model's entry says of chat templates.
    """
    length, longest = calibration["sequence_length"], checkpoint.config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"calibration.sequence_length={length} is longer than the {longest} positions of {checkpoint.folder}: "
            f"set it to at most {longest}."
        )
    return calibration_set(calibration, open_tokenizer(checkpoint.folder, template), locate=locate)


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint, blocks: Tensor, workers: Workers, device: str = "cpu", unfinished: Path | None = None
) -> dict[str, Tensor]:
    """The statistics by the names in which they are stored, with one layer of the model in memory at a time.

    In the folder `unfinished` layers are kept as they are done, and those found there are not computed again.
    """
    stream, count = Stream(checkpoint, blocks, workers, device=device), checkpoint.config.num_layers
    layers = Resume(unfinished, count=count, state=stream).results(lambda number: _layer(stream, checkpoint, number))
    statistics: dict[str, Tensor] = {}
    for _, layer in tqdm(layers, total=count, desc="calibrate", unit="layer", file=sys.stderr, disable=None):
        statistics |= layer.tensors
    return statistics


def _layer(stream: Stream, checkpoint: Checkpoint, number: int) -> LayerResult:
    """The statistics of one layer; the stream is behind it then."""
    layer = stream.dense(LayerTensors(checkpoint, number, stream.device))
    seen = stream.observe(layer, number, _observer, advance=True)
    module = f"model.layers.{number}"
    statistics: dict[str, Tensor] = {}
    for kind, name in (("key", KEY), ("value", VALUE)):
        statistics |= {f"{kind}/{what}/{module}": tensor.cpu() for what, tensor in seen.pop(name).items()}
    for linear, sums in seen.items():
        named = with_means(sums).items()
        # Cloned: q, k and v share what was measured, and the file holds each tensor on its own.
        statistics |= {f"inputs/{what}/{module}.{linear}": tensor.cpu().clone() for what, tensor in named}
    return LayerResult(tensors=statistics)


def _observer() -> Observer:
    return Observer(of_input=channel_statistics, of_kv=head_statistics)


if __name__ == "__main__":
    raise SystemExit(run_stage(work, on_gpus=True))
