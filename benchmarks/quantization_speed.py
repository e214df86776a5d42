"""Seconds to quantize a 7B-shaped model of random weights on one GPU, phase by phase. Appends rows, prints a table.

    python -m benchmarks.quantization_speed FOLDER [--layers 32] [--samples 128] [--recipes awq gptq ...]

FOLDER gets the checkpoint (13 GB with 32 layers), which is made once. The floor is the products that cannot be avoided,
at the rate that a large product of this device reaches in this run: for calibration one pass through the model; for
w4a16 the passes of the walk and the Gram matrices of its inputs. Reading and writing are in the seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.rows import append, commit
from engine.models import names
from engine.models.families import model_config
from engine.storage.checkpoint import Checkpoint
from pipelines.calibrate import calibrate
from pipelines.quant import w4a16, w8a8
from pipelines.quant.stream import side_by_side
from pipelines.recipe_fields import weights_part
from pipelines.schema import Weights
from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results" / "quantization_speed.csv"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LENGTH = 2048
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "gptq, plain": {"method": "gptq", "clip": False, "correction": 0.0},
    "awq+gptq": {"method": "awq+gptq"},
    "w8a8": {"name": "w8a8"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args()
    source = arguments.folder / f"random-{arguments.layers}"
    if not (source / "config.json").exists():
        write_checkpoint(source, arguments.layers)
    checkpoint = Checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, checkpoint.config.vocab_size, (arguments.samples, LENGTH), generator=generator)
    blocks = blocks.to(torch.int32)
    rate, run = product_rate(), commit()
    print(f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        calibration = Path(temporary) / "calibration"
        calibration.mkdir()
        save_file({"tokens": blocks}, calibration / "blocks.safetensors")
        with side_by_side(device="cuda") as workers:
            statistics = measured(
                lambda: calibrate(checkpoint, blocks, workers, "cuda"), "calibrate", checkpoint, blocks, rate, run
            )
        save_file(statistics, calibration / "stats.safetensors")
        for name in arguments.recipes:
            out = Path(temporary) / "out"
            out.mkdir()
            asked: dict[str, Any] = {"name": "w4a16", "group_size": 128, **RECIPES[name]}
            weights, package = weights_part(Weights(**asked)), w8a8 if asked["name"] == "w8a8" else w4a16
            measured(
                lambda w=weights, o=out, p=package: p.quantize(w, source, calibration, o, device="cuda"),
                name,
                checkpoint,
                blocks,
                rate,
                run,
            )
            shutil.rmtree(out)
    return 0


def measured(work: Any, name: str, checkpoint: Checkpoint, blocks: torch.Tensor, rate: float, run: str) -> Any:
    """Do the work, append its row and print it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": run,
        **{library: version for library, version in toolchain().items() if version},
        "device": torch.cuda.get_device_name(),
        "work": name,
        "layers": checkpoint.config.num_layers,
        "samples": len(blocks),
        "sequence_length": LENGTH,
        "seconds": round(seconds, 1),
        "floor_seconds": round(floor(name, checkpoint, blocks.numel()) / rate, 1),
        "peak_gpu_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }
    append(RESULTS, row)
    print(f"| {name} | {row['seconds']} s | {row['floor_seconds']} s | {row['peak_gpu_gb']} GB |", flush=True)
    return result


def floor(name: str, checkpoint: Checkpoint, tokens: int) -> float:
    """Operations of the products that the work cannot do without."""
    config = checkpoint.config
    shapes = [names.linear_shape(config, module) for module in names.LINEARS]
    one_pass = 2 * tokens * sum(out * inputs for out, inputs in shapes)
    grams = 2 * tokens * (3 * config.hidden_size**2 + config.intermediate_size**2)
    if name == "rtn":
        return 0.0
    if name in ("calibrate", "w8a8"):
        return float(config.num_layers * one_pass)
    streams = 2 if name == "awq+gptq" else 1
    return float(config.num_layers * streams * (one_pass + grams))


def product_rate() -> float:
    """Operations a second of a float16 product of 8192 x 8192 x 8192."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (time.perf_counter() - begun)


def write_checkpoint(folder: Path, layers: int) -> None:
    """A Llama of SHAPE with random weights, a file a layer."""
    folder.mkdir(parents=True)
    hf_config = {**SHAPE, "num_hidden_layers": layers}
    config = model_config(hf_config)
    generator = torch.Generator("cuda").manual_seed(0)
    index: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in names.model_tensors(config):
        layer = name.split(".")[2] if ".layers." in name else "outer"
        groups.setdefault(f"model-{layer}.safetensors", []).append(name)
    shapes = names.model_tensors(config)
    for file, held in groups.items():
        tensors = {}
        for name in held:
            shape = tuple(shapes[name])
            values = torch.randn(shape, generator=generator, device="cuda") * 0.02
            tensors[name] = (values + 1 if len(shape) == 1 else values).half().cpu()
            index[name] = file
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(hf_config))


if __name__ == "__main__":
    raise SystemExit(main())
