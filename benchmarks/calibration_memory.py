"""Peak memory of calibration on a synthetic checkpoint of 24 layers and 2 GB, against its bound. Appends one row.

The bound on the peak above the start is 1.3 x (one layer in float32 + 2 batches of hidden states) + 200 MB, a batch
being the hidden states of all samples. Exit code 1 when it does not hold.

    python -m benchmarks.calibration_memory [--samples 8 --sequence-length 128]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import append, commit
from engine.config import ModelConfig
from engine.models import names
from engine.models.families import model_config
from engine.storage.checkpoint import Checkpoint
from pipelines.calibrate import calibrate
from pipelines.quant.stream import side_by_side
from pipelines.quant.tensor_file import TensorFile
from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results" / "calibration_memory.csv"
MEGABYTE = 1e6
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.samples, arguments.sequence_length)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder))
        # A process of its own: what writing left in the allocator would hide what calibration takes.
        command = [sys.executable, "-m", "benchmarks.calibration_memory", "--measure", folder]
        command += ["--samples", str(arguments.samples), "--sequence-length", str(arguments.sequence_length)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    config = model_config(SHAPE)
    hidden = arguments.samples * arguments.sequence_length * config.hidden_size * 4
    bound = 1.3 * (layer_bytes(config) + 2 * hidden) + 200 * MEGABYTE
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        **{name: version for name, version in toolchain().items() if version},
        "processors": os.cpu_count(),
        "checkpoint_mb": round(size / MEGABYTE),
        "layers": config.num_layers,
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "layer_fp32_mb": round(layer_bytes(config) / MEGABYTE, 1),
        "hidden_mb": round(hidden / MEGABYTE, 1),
        "peak_mb": round(measured["peak"] / MEGABYTE, 1),
        "bound_mb": round(bound / MEGABYTE, 1),
        "seconds": round(measured["seconds"], 1),
    }
    append(RESULTS, row)
    print(", ".join(f"{name}={value}" for name, value in row.items()))
    return 0 if measured["peak"] <= bound else 1


def measure(folder: Path, samples: int, sequence_length: int) -> dict[str, float]:
    """Bytes of peak resident memory above the start (everything imported), and seconds, of one calibration."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, SHAPE["vocab_size"], (samples, sequence_length), generator=generator)  # type: ignore[call-overload]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    start, begun = resident("VmRSS"), time.perf_counter()
    with side_by_side() as workers:
        calibrate(Checkpoint(folder), blocks, workers)
    return {"peak": resident("VmHWM") - start, "seconds": time.perf_counter() - begun}


def write_checkpoint(folder: Path, shape: Mapping[str, Any] = SHAPE) -> int:
    """A checkpoint of a shape with random weights, written tensor by tensor; returns the bytes of its weights."""
    (folder / "config.json").write_text(json.dumps(shape))
    config = model_config(shape)
    shapes = {name: size for name, size in names.model_tensors(config).items() if name != names.HEAD}
    generator = torch.Generator().manual_seed(0)
    plan = {name: (torch.float16, size) for name, size in shapes.items()}
    with TensorFile(folder / "model.safetensors", plan) as file:
        for name, size in shapes.items():
            values = torch.randn(size, generator=generator) * size[-1] ** -0.5
            file.write(name, torch.ones(size, dtype=torch.float16) if len(size) == 1 else values.half())
    return (folder / "model.safetensors").stat().st_size


def layer_bytes(config: ModelConfig) -> int:
    """Bytes of one layer in float32."""
    return 4 * sum(math.prod(shape) for shape in names.layer_tensors(config).values())


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: this benchmark runs on Linux")


if __name__ == "__main__":
    raise SystemExit(main())
