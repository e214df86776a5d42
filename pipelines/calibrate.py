"""The stage `calibrate`: what flows through the unquantized model on the calibration text, in two files.

`stats.safetensors`: float32 `inputs/<min|max|mean|absmax|absmean>/<linear>` [in] of every linear, and
`<key|value>/<min|max|absmax>/model.layers.<i>` [kv_heads, head_dim] with K after rotary. `blocks.safetensors`:
`tokens` int32 [samples, sequence_length], the blocks that it was measured on.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint
from pipelines.data.blocks import token_blocks
from pipelines.data.texts import read_documents
from pipelines.quant.observers import KEY, VALUE, Observer, channel_statistics, head_statistics, with_means
from pipelines.quant.stream import LayerTensors, Stream, Workers, side_by_side
from pipelines.slices import Call, locate, output, run_stage
from pipelines.sources import pickled


def work(call: Call) -> None:
    record = call.slice["model"]
    checkpoint = Checkpoint(locate(record), allow_bin=pickled(record), allow_quantized=True)
    blocks = calibration_blocks(call.slice["calibration"], checkpoint)
    with output(call.out) as folder, side_by_side() as workers:
        save_file({"tokens": blocks}, folder / "blocks.safetensors")
        save_file(calibrate(checkpoint, blocks, workers), folder / "stats.safetensors")


def calibration_blocks(calibration: dict[str, Any], checkpoint: Checkpoint) -> Tensor:
    """The token blocks of a slice's calibration; ValueError where they do not fit the model or the text."""
    length, longest = calibration["sequence_length"], checkpoint.config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"calibration.sequence_length={length} is longer than the {longest} positions of {checkpoint.folder}: "
            f"set it to at most {longest}."
        )
    tokenizer = Tokenizer(checkpoint.folder)
    documents = read_documents(calibration["text"])
    options = {name: calibration[name] for name in ("samples", "sequence_length", "sampling", "seed")}
    return token_blocks(documents, tokenizer.encode, **options)


@torch.inference_mode()
def calibrate(checkpoint: Checkpoint, blocks: Tensor, workers: Workers) -> dict[str, Tensor]:
    """The statistics by the names in which they are stored, with one layer of the model in memory at a time."""
    stream = Stream(checkpoint, blocks, workers)
    statistics: dict[str, Tensor] = {}
    layers = range(checkpoint.config.num_layers)
    for number in tqdm(layers, desc="calibrate", unit="layer", file=sys.stderr, disable=None):
        layer = stream.dense(LayerTensors(checkpoint, number))
        seen = stream.observe(layer, number, _observer, advance=True)
        del layer  # before the next one is read: one layer in memory
        module = f"model.layers.{number}"
        for kind, name in (("key", KEY), ("value", VALUE)):
            statistics |= {f"{kind}/{what}/{module}": tensor for what, tensor in seen.pop(name).items()}
        for linear, sums in seen.items():
            named = with_means(sums).items()
            # Cloned: q, k and v share what was measured, and the file holds each tensor on its own.
            statistics |= {f"inputs/{what}/{module}.{linear}": tensor.clone() for what, tensor in named}
    return statistics


def _observer() -> Observer:
    return Observer(of_input=channel_statistics, of_kv=head_statistics)


if __name__ == "__main__":
    raise SystemExit(run_stage(work))
