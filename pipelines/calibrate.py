"""The stage `calibrate`: what flows through the unquantized model on the calibration text, in three files.

`stats.safetensors`: float32 `inputs/<min|max|mean|absmax|absmean>/<linear>` [in] of every linear, and
`<key|value>/<min|max|absmax>/model.layers.<i>` [kv_heads, head_dim] with K after rotary. `blocks.safetensors`:
`tokens` int32 [samples, sequence_length], the blocks that it was measured on. `calibration.json`: what these are, by
digests of the blocks, the tokenizer, the chat template and the texts.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.storage.checkpoint import Checkpoint
from pipelines.chat_templates import open_tokenizer
from pipelines.data.calibration_set import calibration_set
from pipelines.quant.observers import KEY, VALUE, Observer, channel_statistics, head_statistics, with_means
from pipelines.quant.stream import LayerTensors, Stream, Workers, side_by_side
from pipelines.slices import Call, locate, output, run_stage, write_json
from pipelines.sources import pickled


def work(call: Call) -> None:
    record = call.slice["model"]
    checkpoint = Checkpoint(locate(record), allow_bin=pickled(record), allow_quantized=True)
    blocks, about = calibration_blocks(call.slice["calibration"], checkpoint, call.slice.get("template"))
    with output(call.out) as folder, side_by_side(device=call.device) as workers:
        save_file({"tokens": blocks}, folder / "blocks.safetensors")
        write_json(folder / "calibration.json", about)
        save_file(calibrate(checkpoint, blocks, workers, call.device), folder / "stats.safetensors")


def calibration_blocks(
    calibration: dict[str, Any], checkpoint: Checkpoint, template: str | None = None
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
    return calibration_set(calibration, open_tokenizer(checkpoint.folder, template))


@torch.inference_mode()
def calibrate(checkpoint: Checkpoint, blocks: Tensor, workers: Workers, device: str = "cpu") -> dict[str, Tensor]:
    """The statistics by the names in which they are stored, with one layer of the model in memory at a time."""
    stream = Stream(checkpoint, blocks, workers, device=device)
    statistics: dict[str, Tensor] = {}
    layers = range(checkpoint.config.num_layers)
    for number in tqdm(layers, desc="calibrate", unit="layer", file=sys.stderr, disable=None):
        layer = stream.dense(LayerTensors(checkpoint, number, device))
        seen = stream.observe(layer, number, _observer, advance=True)
        del layer  # before the next one is read: one layer in memory
        module = f"model.layers.{number}"
        for kind, name in (("key", KEY), ("value", VALUE)):
            statistics |= {f"{kind}/{what}/{module}": tensor.cpu() for what, tensor in seen.pop(name).items()}
        for linear, sums in seen.items():
            named = with_means(sums).items()
            # Cloned: q, k and v share what was measured, and the file holds each tensor on its own.
            statistics |= {f"inputs/{what}/{module}.{linear}": tensor.cpu().clone() for what, tensor in named}
    return statistics


def _observer() -> Observer:
    return Observer(of_input=channel_statistics, of_kv=head_statistics)


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
