"""Our 4-bit quantization beside llm-compressor's: the same checkpoint, token blocks, groups and thread count.

    python -m benchmarks.peer_quantization DATA [--models NAME ...] [--methods NAME ...] [--blocks 32]

DATA, the models, the items, the blocks and the methods' names are those of `benchmarks.recipe_quality`. `gptq, plain`
does what the peer's GPTQ does; `gptq` also searches ranges and makes up for the drift of inputs. The peer lives in an
environment of its own under .ingot/peers/, which is made once (its version and torch are pinned here). The two take
turns, `--rounds` times, on the same `--threads` processors. The clocks: ours from the first byte read of the
checkpoint to the last one written, the peer's while it quantizes a model that it has in memory. Both perplexities are
measured by our engine; the peer's checkpoint comes in through the reader of compressed-tensors. Appends rows, prints
a table, and exits 1 where a method of ours is worse, or takes more than a third of the peer's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.peer_quantization_process import MARK
from benchmarks.recipe_quality import ANSWERS, ENGLISH, MODELS, SMOLLM2, Item, answers, decoder, perplexity, stories
from benchmarks.recipe_quality import METHODS as OURS
from benchmarks.rows import RESULTS, ROOT, append, provenance
from engine.models.decoder import Decoder
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint
from pipelines.quant import w4a16
from pipelines.recipe_fields import weights_part
from pipelines.schema import Weights

PEER = "llmcompressor==0.14.0.1"
ENVIRONMENTS = ROOT / ".ingot/peers"
METHODS = ("awq", "gptq, plain", "gptq", "awq+gptq")
BAR = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One quantization that both do."""

    checkpoint: Path
    blocks: Path
    method: str
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """What one of them took, and where the result lies."""

    tool: str
    seconds: float
    processor_seconds: float
    out: Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS)[:2], choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--groups", nargs="+", type=int, help="of those that the model has; its first if not given")
    parser.add_argument("--more", type=Path, help="a folder with further models/<name>")
    parser.add_argument("--blocks", type=int, default=32, help="calibration blocks (32)")
    parser.add_argument("--items", type=int, help="stories or answers that are scored (100, 40)")
    parser.add_argument("--rounds", type=int, default=2, help="times that each of them is run (2)")
    parser.add_argument("--threads", type=int, default=2, help="processors for each of them (2)")
    parser.add_argument("--batch", type=int, default=1, help="blocks that the peer takes at a time (1, its default)")
    options = parser.parse_args()
    for name in options.models:
        if not any((place / "models" / name).is_dir() for place in (options.data, options.more) if place):
            parser.error(f"{options.data} has no models/{name}: give the folder that has models/ and the texts")
    python = peer_python(ENVIRONMENTS / PEER.replace("==", "-"))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # processes started here inherit it
    missed = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            missed += compare(name, options, python, Path(folder))
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def peer_python(folder: Path) -> Path:
    """The Python of the peer's environment, which is made where it is not whole. Torch is the one that runs here."""
    python, made = folder / "bin/python", folder / "made"
    if not made.exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        ours = f"torch=={metadata.version('torch').partition('+')[0]}"
        print(f"installing {PEER} and {ours} into {folder}", flush=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER, ours], check=True)
        made.touch()
    return python


def compare(name: str, options: argparse.Namespace, python: Path, folder: Path) -> list[str]:
    """All methods and groups of one model, a row for each run; the bars that were missed."""
    place = options.data / "models" / name
    checkpoint = Checkpoint(place if place.exists() or options.more is None else options.more / "models" / name)
    tokenizer = Tokenizer(checkpoint.folder)
    if name.startswith("stories"):
        items, tokens = stories(options.data, tokenizer, options.blocks)
    else:
        items, tokens = answers(options.data / (ENGLISH if name == SMOLLM2 else ANSWERS), tokenizer, options.blocks)
    items, missed = items[: options.items], []
    save_file({"tokens": tokens}, folder / "blocks.safetensors")
    for group_size in options.groups or MODELS[name][:1]:
        for method in options.methods:
            case = Case(
                checkpoint=checkpoint.folder, blocks=folder / "blocks.safetensors", method=method, group_size=group_size
            )
            ours, theirs = [], []
            for turn in range(options.rounds):
                ours.append(quantize(case, folder / f"ours-{method}-{group_size}-{turn}"))
                theirs.append(quantize_by_peer(case, folder / f"theirs-{method}-{group_size}-{turn}", python, options))
            values = [
                perplexity(decoder(checkpoint, ours[0].out / "weights.safetensors"), items, None),
                perplexity(read(theirs[0].out), items, None),
            ]
            for runs, value in zip((ours, theirs), values, strict=True):
                for run in runs:
                    record(name, case, options, items, run, value)
            missed += judged(name, case, ours, theirs, values)
    return missed


def quantize(case: Case, out: Path) -> Took:
    """Ours: the stage's own work, reading and writing included."""
    calibration = out.with_name(f"{out.name}-calibration")
    calibration.mkdir()
    shutil.copy(case.blocks, calibration / "blocks.safetensors")
    out.mkdir()
    asked: dict[str, Any] = {"name": "w4a16", "group_size": case.group_size, **OURS[case.method]}
    weights = Weights(**asked)
    begun, spent = time.perf_counter(), time.process_time()
    w4a16.quantize(weights_part(weights), case.checkpoint, calibration, out)
    return Took(
        tool="ingot",
        seconds=time.perf_counter() - begun,
        processor_seconds=time.process_time() - spent,
        out=out,
    )


def quantize_by_peer(case: Case, out: Path, python: Path, options: argparse.Namespace) -> Took:
    """The peer's, in a process of its own; RuntimeError with its last words where it fails."""
    job = {
        "checkpoint": str(case.checkpoint),
        "blocks": str(case.blocks),
        "method": case.method,
        "group_size": case.group_size,
        "threads": options.threads,
        "batch": options.batch,
        "out": str(out),
    }
    file = out.with_suffix(".json")
    file.write_text(json.dumps(job), encoding="utf-8")
    # Nothing is to be reported to anybody, nor fetched: the model and the tokens are here.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    # Threads that wait for work do not burn the processors: the better for it on a machine that does other work too.
    more = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [str(python), "-P", "-m", "benchmarks.peer_quantization_process", str(file)]
    answer = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **offline, **more}, cwd=out.parent
    )
    said = [line for line in answer.stdout.splitlines() if line.startswith(MARK)]
    if answer.returncode or not said:
        raise RuntimeError(f"{PEER} failed at {case.method}: " + "\n".join(answer.stderr.splitlines()[-5:]))
    return Took(**json.loads(said[0][len(MARK) :]), out=out)


def read(folder: Path) -> Decoder:
    """The peer's checkpoint through our reader of compressed-tensors, computing in float32."""
    stored = Checkpoint(folder, allow_quantized=True)
    return Decoder(stored.config, stored.weights(), device="cpu", dtype=torch.float32)


def record(name: str, case: Case, options: argparse.Namespace, items: Sequence[Item], run: Took, value: float) -> None:
    row: dict[str, Any] = {
        **provenance(),
        "model": name,
        "method": case.method,
        "group_size": case.group_size,
        "blocks": options.blocks,
        "block_tokens": load_file(case.blocks)["tokens"].shape[1],
        "threads": options.threads,
        "tool": run.tool,
        "perplexity": round(value, 5),
        "scored_tokens": sum(len(ids) - first for ids, first in items),
        "seconds": round(run.seconds, 2),
        "processor_seconds": round(run.processor_seconds, 2),
    }
    append(RESULTS / "peer_quantization.csv", row)


def judged(name: str, case: Case, ours: list[Took], theirs: list[Took], values: list[float]) -> list[str]:
    """Print a row of the table; what it misses. The time is the median of each, so neither has the better moment."""
    a, b = (statistics.median(run.seconds for run in runs) for runs in (ours, theirs))
    c, d = (statistics.median(run.processor_seconds for run in runs) for runs in (ours, theirs))
    print(
        f"| {name} | {case.group_size} | {case.method} | {values[0]:.4f} | {values[1]:.4f} | {a:.1f} | {b:.1f} | "
        f"{b / a:.1f} x | {c:.1f} | {d:.1f} | {d / c:.1f} x |",
        flush=True,
    )
    what = f"{name}, groups of {case.group_size}, {case.method}"
    missed = [f"{what}: perplexity {values[0]:.4f}, the peer's {values[1]:.4f}"] if values[0] > values[1] else []
    if a > BAR * b or c > BAR * d:
        missed.append(f"{what}: {a:.1f} s ({c:.1f} of processors), the peer's {b:.1f} s ({d:.1f})")
    return missed


if __name__ == "__main__":
    sys.exit(main())
