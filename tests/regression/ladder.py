"""The demo's ladder: built from its committed model and conf/, put into few numbers, and compared with committed ones.

A golden of a rung holds the artifact's id, the SHA-256 of every file, a sketch of every weight by its canonical name,
the KV scales, and what the engine says to two prompts (see `engine/runtime/selftest.py`, which also says what a sketch
and its tolerance are). They are recorded per device class: on another one bits may differ, so ids, files and greedy
tokens are not compared there, and sketches are.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels.reference import unpack_int4
from engine.models import names
from engine.models.cache import KVScales
from engine.models.decoder import Decoder
from engine.runtime import selftest
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.artifacts import read_manifest
from engine.storage.workspace import Workspace
from pipelines.selection import read_rows, read_selection
from pipelines.toolchain import device_class, fix_instruction_set
from tests.pipelines.chain import Chain

PROJECT = Path(__file__).resolve().parents[2]
GOLDENS = Path(__file__).with_name("goldens")
RUNGS = ("fp16-1-kv16", "fp16-1-kv8", "w8a8-1-kv16", "w8a8-1-kv8", "w4a16-1-kv16", "w4a16-1-kv8")
QUESTIONS = ("In which town does Mirela live?", "What is made in Mosswell?")
NUM_TOKENS = 8


def demo_chain(root: Path) -> Chain:
    """The stages of the demo as conf/ and params.yaml declare them, run in `root`."""
    return Chain(root, read_rows(PROJECT, read_selection(PROJECT / "params.yaml")), project=PROJECT)


def built_chain(root: Path) -> Chain:
    """`demo_chain` with every rung built by a process of its own, which computes as its device class does.

    Which instructions torch computes with is settled by its first operation, and other tests may have had theirs.
    """
    subprocess.run([sys.executable, "-m", "tests.regression.ladder", str(root)], cwd=PROJECT, check=True)
    return demo_chain(root)


def key(rung: str) -> str:
    return f"demo-demo_text-{rung}"


def measure(folder: Path, *, rope_theta: float | None = None) -> dict[str, Any]:
    """The golden of an artifact. `rope_theta` runs it with another rotary base than it says."""
    manifest, workspace = read_manifest(folder), Workspace(folder)
    config = workspace.config if rope_theta is None else dataclasses.replace(workspace.config, rope_theta=rope_theta)
    model = Decoder(config, workspace.weights(), device="cpu", dtype=torch.float32)
    scales = workspace.kv_scales()
    tokenizer = Tokenizer(workspace.tokenizer_folder)
    engine = Engine(model, tokenizer, EngineConfig(), session_len=128, kv_scales=scales)
    prompts = {text: tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS}
    return {
        "id": manifest.id,
        "files": {entry.path: entry.sha256 for entry in manifest.files},
        # A kv8 rung has the weight files of its kv16 rung, which are compared by their digests.
        "weights": {} if scales is not None else sketches(weights(workspace)),
        "kv_scales": _kv_scales(scales.key, scales.value) if isinstance(scales, KVScales) else {},
        "tolerance": selftest.tolerance_of(manifest.recipe),
        "prompts": selftest.record(engine, model, scales, prompts, num_tokens=NUM_TOKENS),
    }


def weights(workspace: Workspace) -> dict[str, Tensor]:
    """Every weight by its unquantized canonical name: quantized ones as what the engine multiplies by."""
    found: dict[str, Tensor] = {}
    scaled = {name for name in workspace.names() if name.endswith(names.WEIGHT_SCALE)}
    for name in workspace.names():
        module, _, part = name.rpartition(".")
        if f"{module}.{names.WEIGHT_SCALE}" in scaled and part in names.INT8:
            if part == "weight":
                scales = workspace.tensor(f"{module}.{names.WEIGHT_SCALE}")
                found[name] = workspace.tensor(name).float() * scales.unsqueeze(-1)
        elif part not in names.QUANTIZED:
            found[name] = workspace.tensor(name)
        elif part == "qweight":
            found[f"{module}.weight"] = unpack_int4(*(workspace.tensor(f"{module}.{p}") for p in names.QUANTIZED))
    return found


def sketches(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: selftest.sketch(tensor) for name, tensor in tensors.items()}


def compare(recorded: Mapping[str, Any], here: Mapping[str, Any], *, exact: bool) -> list[str]:
    """What differs, a sentence each, weights before what is computed with them; empty if nothing does.

    `exact`, for the recorded device class, compares ids, files and greedy tokens too.
    """
    found = [
        *compare_tensors(recorded["weights"], here["weights"]),
        *compare_tensors(recorded["kv_scales"], here["kv_scales"]),
    ]
    for golden, now in zip(recorded["prompts"], here["prompts"], strict=True):
        if (located := selftest.first_difference(golden["trace"], now["trace"], recorded["tolerance"])) is not None:
            found.append(located)
        if golden["token_ids"] != now["token_ids"]:
            found.append(f"The tokens of {golden['prompt']!r} are {now['token_ids']}, not {golden['token_ids']}.")
        if exact and golden["answer_ids"] != now["answer_ids"]:
            found.append(f"The answer to {golden['prompt']!r} is {now['answer_ids']}, not {golden['answer_ids']}.")
    if exact:
        files = {**recorded["files"], **here["files"]}
        changed = [path for path in sorted(files) if recorded["files"].get(path) != here["files"].get(path)]
        found += [f"The file {path} is not what it was." for path in changed]
        if recorded["id"] != here["id"]:
            found.append(f"The artifact's id is {here['id']}, not {recorded['id']}.")
    return found


def read_goldens() -> tuple[dict[str, Any], bool]:
    """The goldens of this device class and True; where there are none, the first other class's and False."""
    path = GOLDENS / f"{device_class()}.json"
    if path.is_file():
        return json.loads(path.read_text()), True
    return json.loads(sorted(GOLDENS.glob("*.json"))[0].read_text()), False


def compare_tensors(recorded: Mapping[str, list[float]], here: Mapping[str, list[float]]) -> list[str]:
    """What differs between two tables of sketches, a sentence for each tensor."""
    tolerance = selftest.FLOAT_TOLERANCE
    found = [f"{name} is missing." for name in recorded if name not in here]
    found += [f"{name} was not there." for name in here if name not in recorded]
    for name in recorded:
        if name in here and (share := selftest.deviation(recorded[name], here[name])) > tolerance:
            found.append(f"{name} deviates by {share:.2%} of its size (tolerance {tolerance:.2%}).")
    return found


def _kv_scales(key_scales: Tensor, value_scales: Tensor) -> dict[str, list[float]]:
    return {
        f"model.layers.{layer}.self_attn.{kind} (KV scales)": selftest.sketch(scales[layer])
        for layer in range(len(key_scales))
        for kind, scales in (("k", key_scales), ("v", value_scales))
    }


if __name__ == "__main__":
    fix_instruction_set(device_class())
    building = demo_chain(Path(sys.argv[1]))
    for each in RUNGS:
        building.artifact(key(each))
