"""Speed and peak memory of `ingot convert` on a synthetic checkpoint of 2 GB in four files. Appends a row a conversion.

Seconds are by the clock, `processor_seconds` those of all threads. Beside them stand the seconds that its bytes take
otherwise: a plain copy of what was written, flushed to disk, and then its SHA-256, one file after the other in one
thread. The bound on the peak above the start is what the checkpoint has for the largest file of the workspace (q, k and
v lie in one) + 64 MB. Exit code 1 when it does not hold.

    python -m benchmarks.conversion [--weights fp16 w4a16] [--tp 1 2] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch

from benchmarks.calibration_memory import MEGABYTE, resident
from benchmarks.rows import append, commit
from engine.config import ModelConfig
from engine.models import names
from engine.models.families import model_config
from engine.storage.workspace import WEIGHTS
from pipelines.convert import Conversion, convert
from pipelines.quant.tensor_file import TensorFile
from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results" / "conversion.csv"
DEMO = Path(__file__).parents[1] / "demo" / "model"
FILES = 4
GROUP_SIZE = 128
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LAYERS = {"fp16": 17, "w4a16": 62}
QUANTIZATION = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where there is room for 3 x 2 GB (the system's temporary folder)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        source, target, tp = arguments.measure
        print(json.dumps(measure(Path(source), Path(target), int(tp))))
        return 0
    held = True
    for weights in arguments.weights:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            source = Path(folder) / "checkpoint"
            size, largest = write_checkpoint(source, weights)
            for tp in arguments.tp:
                held &= row(weights, tp, source, Path(folder), size=size, largest=largest)
    return 0 if held else 1


def row(weights: str, tp: int, source: Path, folder: Path, *, size: int, largest: int) -> bool:
    """Measure one conversion, append its row, and say whether the bound holds."""
    target = folder / f"workspace-{tp}"
    # A process of its own: what writing left in the allocator would hide what converting takes.
    command = [sys.executable, "-m", "benchmarks.conversion", "--measure", str(source), str(target), str(tp)]
    measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    written = [path for path in (target / WEIGHTS).iterdir() if path.is_file()]
    total = sum(path.stat().st_size for path in written)
    copied, hashed = floor(written, folder / "copy")
    shutil.rmtree(target)
    bound = largest + 64 * MEGABYTE
    cells = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        **{name: version for name, version in toolchain().items() if version},
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "weights": weights,
        "tp": tp,
        "checkpoint_mb": round(size / MEGABYTE),
        "written_mb": round(total / MEGABYTE),
        "seconds": round(measured["seconds"], 1),
        "processor_seconds": round(measured["processor_seconds"], 1),
        "mb_per_second": round(total / MEGABYTE / measured["seconds"]),
        "copy_seconds": round(copied, 1),
        "sha256_seconds": round(hashed, 1),
        "peak_mb": round(measured["peak"] / MEGABYTE, 1),
        "largest_mb": round(largest / MEGABYTE, 1),
        "bound_mb": round(bound / MEGABYTE, 1),
    }
    append(RESULTS, cells)
    print(", ".join(f"{name}={value}" for name, value in cells.items()), flush=True)
    return bool(measured["peak"] <= bound)


def measure(source: Path, target: Path, tp: int) -> dict[str, float]:
    """Bytes of peak resident memory above the start (after another conversion), and seconds, of one conversion."""
    asked = Conversion(
        name="base",
        source=source,
        target=target,
        tp=tp,
        model_format="awq" if "quantization_config" in (source / "config.json").read_text() else "hf",
    )
    # Pages of code that a busy machine has put away, or that nothing has asked for yet, are no memory of a conversion.
    with tempfile.TemporaryDirectory() as folder:
        convert(Conversion(name="base", source=DEMO, target=Path(folder) / "workspace"))
    gc.collect()
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    start, begun, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
    convert(asked)
    seconds, processor_seconds = time.perf_counter() - begun, time.process_time() - worked
    return {"peak": resident("VmHWM") - start, "seconds": seconds, "processor_seconds": processor_seconds}


def floor(files: list[Path], target: Path) -> tuple[float, float]:
    """Seconds of copying files to new ones that are on disk, and of their SHA-256."""
    os.sync()
    target.mkdir()
    begun = time.perf_counter()
    for path in files:
        with path.open("rb") as source, (target / path.name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 22)
            copy.flush()
            os.fsync(copy.fileno())
    copied = time.perf_counter() - begun
    begun = time.perf_counter()
    for path in target.iterdir():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    hashed = time.perf_counter() - begun
    shutil.rmtree(target)
    return copied, hashed


def write_checkpoint(folder: Path, weights: str) -> tuple[int, int]:
    """A checkpoint with random weights; returns its bytes, and those of what it has for the largest file."""
    folder.mkdir()
    content = SHAPE | {"num_hidden_layers": LAYERS[weights]}
    config = model_config(content)
    if weights == "w4a16":
        content |= {"quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(content))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = tokenizers.decoders.ByteLevel()
    words.save(str(folder / "tokenizer.json"))
    pool = torch.randn(8_000_000, generator=torch.Generator().manual_seed(0)).half() * 0.02
    plan = dict(tensors(config, weights))
    placed: dict[str, str] = {}
    size, share = 0, math.ceil(len(plan) / FILES)
    for number in range(FILES):
        part = dict(list(plan.items())[number * share : (number + 1) * share])
        path = folder / f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        with TensorFile(path, part) as file:
            for name, (dtype, shape) in part.items():
                repeated = pool.repeat(-(-math.prod(shape) * dtype.itemsize // (2 * len(pool))))
                file.write(name, repeated.view(dtype)[: math.prod(shape)].view(shape))
        placed |= dict.fromkeys(part, path.name)
        size += path.stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    of_layer = {name.removeprefix(names.layer_name(0, "")): one for name, one in plan.items()}
    together = [
        sum(dtype.itemsize * math.prod(shape) for name, (dtype, shape) in of_layer.items() if name.startswith(modules))
        for modules in (names.QKV, names.GATE_UP if weights == "w4a16" else names.GATE_UP[:1])
    ]
    return size, max(*together, 2 * config.vocab_size * config.hidden_size)


def tensors(config: ModelConfig, weights: str) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Name, type and shape of every tensor of a checkpoint, 4-bit linears in the HF-AWQ form."""
    for name, shape in names.model_tensors(config).items():
        module = name.removesuffix(".weight")
        if weights == "fp16" or names.split_name(module)[1] not in names.LINEARS:
            yield name, (torch.float16, shape)
            continue
        outputs, inputs = shape
        yield f"{module}.qweight", (torch.int32, (inputs, outputs // 8))
        yield f"{module}.qzeros", (torch.int32, (inputs // GROUP_SIZE, outputs // 8))
        yield f"{module}.scales", (torch.float16, (inputs // GROUP_SIZE, outputs))


if __name__ == "__main__":
    raise SystemExit(main())
