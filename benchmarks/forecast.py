"""What calibrate and quantize are expected to take, beside what they take: peak memory and seconds. Appends rows.

Synthetic checkpoints of one layer and random weights; every stage runs in a process of its own. Exit code 1 when a peak
is above its forecast by more than a tenth, or so far below it that half of the forecast was never there.

    python -m benchmarks.forecast [--shapes small wide] [--samples 16] [--sequence-length 256]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.calibration_memory import MEGABYTE, SHAPE, write_checkpoint
from benchmarks.rows import append, commit
from engine.storage.checkpoint import Checkpoint
from pipelines.calibrate import calibrate
from pipelines.forecast import load_of, seconds_of
from pipelines.machine import measured
from pipelines.quant.cost import LIBRARIES, calibration_cost, quantization_cost
from pipelines.quant.stream import side_by_side
from pipelines.recipe_fields import weights_part
from pipelines.schema import Weights

RESULTS = Path(__file__).parent / "results" / "forecast.csv"
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8},
    "wide": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
}
STAGES: dict[str, dict[str, Any]] = {
    "calibrate": {},
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq", "correction": 0.0, "clip": False},
    "awq+gptq": {"method": "awq+gptq"},
    "w8a8": {"name": "w8a8"},
}
MOST_OVER, LEAST = 1.1, 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "wide"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "STAGE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, stage = arguments.measure
        print(json.dumps(measure(Path(folder), stage, arguments.samples, arguments.sequence_length, arguments.device)))
        return 0
    bad = 0
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            layer = {"head_dim": SHAPES[shape]["hidden_size"] // SHAPES[shape]["num_attention_heads"]}
            write_checkpoint(Path(folder), SHAPE | SHAPES[shape] | layer | {"num_hidden_layers": 1})
            for stage in STAGES:
                command = [sys.executable, "-m", "benchmarks.forecast", "--measure", folder, stage]
                command += ["--samples", str(arguments.samples), "--sequence-length", str(arguments.sequence_length)]
                command += ["--device", arguments.device]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                row = {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "commit": commit(),
                    "device": arguments.device if arguments.device == "cpu" else torch.cuda.get_device_name(),
                    "processors": os.cpu_count(),
                    "shape": shape,
                    "stage": stage,
                    "samples": arguments.samples,
                    "sequence_length": arguments.sequence_length,
                    **found,
                }
                append(RESULTS, row)
                print(", ".join(f"{name}={value}" for name, value in row.items()), flush=True)
                peak, expected = found["peak_mb"], found["forecast_mb"]
                bad += peak > MOST_OVER * expected or peak + LIBRARIES / MEGABYTE < LEAST * expected
    return int(bad > 0)


def measure(folder: Path, stage: str, samples: int, length: int, device: str) -> dict[str, float]:
    """Forecast and measured peak in MB, forecast and measured seconds, and the seconds of processor time."""
    config = Checkpoint(folder).config
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, config.vocab_size, (samples, length), generator=generator, dtype=torch.int32)
    weights = weights_part(Weights(**{"name": "w4a16", "activation_exponents": [0.0, 0.4], **STAGES[stage]}))
    load = load_of(config, samples, length, device)
    cost = calibration_cost(config, load) if stage == "calibrate" else quantization_cost(config, weights, load)
    seconds = seconds_of(cost, load, device)
    with tempfile.TemporaryDirectory() as out:
        save_file({"tokens": blocks}, Path(out) / "blocks.safetensors")
        begun = time.process_time()
        with measured(device) as used:
            if stage == "calibrate":
                with side_by_side(device=device) as workers:
                    calibrate(Checkpoint(folder), blocks, workers, device)
            else:
                recipe = importlib.import_module(f"pipelines.quant.{weights.get('name', 'w4a16')}")
                recipe.quantize(weights, folder, Path(out), Path(out), device=device)
    return {
        "forecast_mb": round(cost.peak / MEGABYTE, 1),
        "peak_mb": round(used.memory / MEGABYTE, 1),
        "forecast_seconds": round(seconds, 1),
        "seconds": round(used.seconds, 1),
        "processor_seconds": round(time.process_time() - begun, 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
