"""Other engines over the same cases: Hugging Face transformers, and vLLM and LMDeploy where a Python has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import option
from benchmarks.peer_process import MARK, PEERS
from benchmarks.rows import ROOT
from benchmarks.subject import Subject, SubjectOptions
from benchmarks.timeline import Run, Timeline
from benchmarks.workload import Request, longest

# What each engine takes of weights and KV caches, of what can be written for it.
TAKES = {
    "hf": ({"fp16"}, {"kv16"}),
    "vllm": ({"fp16", "w8a8", "w4a16"}, {"kv16"}),
    "lmdeploy": ({"fp16", "w4a16"}, {"kv16", "kv8"}),
}
MODULES = {"hf": "transformers", "vllm": "vllm", "lmdeploy": "lmdeploy"}
TIMEOUT = 4 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions(SubjectOptions):
    """The options of a benchmark that other engines can run too."""

    peer: str | None = option(None, "another engine runs the cases, over the same random weights", choices=tuple(PEERS))
    deterministic: bool = option(False, "answers that are the same bits in every batch; of our engine alone")
    python: str = option(sys.executable, "the Python that has the peer")


def check_peer(options: PeerOptions, subject: Subject) -> None:
    """ValueError where the peer cannot run this model, or its Python does not have it."""
    assert options.peer is not None
    if options.deterministic:
        raise ValueError("deterministic=true goes with our engine: leave it out, or peer=.")
    if subject.tp > 1:
        raise ValueError(f"tp={subject.tp} goes with our engine: leave it out, or peer=.")
    if subject.folder is not None:
        raise ValueError(f"peer={options.peer} goes with shape=NAME: it reads checkpoints, not workspaces.")
    weights, caches = TAKES[options.peer]
    for name, value, known in (("weights", subject.recipe.weights, weights), ("kv", subject.recipe.kv, caches)):
        if value not in known:
            raise ValueError(
                f"peer={options.peer} is not run with {name}={value}; it is with {', '.join(sorted(known))}."
            )
    if subject.recipe.head != "fp16":
        raise ValueError(f"peer={options.peer} is not run with head={subject.recipe.head}; it is with fp16.")
    if subject.device.startswith("cpu") and options.peer != "hf":
        raise ValueError(f"peer={options.peer} needs a GPU; on a CPU there is peer=hf.")
    module = MODULES[options.peer]
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        found = subprocess.run([options.python, "-c", code], capture_output=True)
    except OSError as error:
        raise ValueError(f"python={options.python} cannot be started: {error.strerror}.") from error
    if found.returncode:
        raise ValueError(f"python={options.python} has no {module}: name one that has, with python=PATH.")


def run_peer(
    options: PeerOptions, subject: Subject, cases: Sequence[Sequence[Request]], *, at_once: int, time_first: bool = True
) -> list[Run]:
    """The cases one after the other in one process of the peer; ValueError, with its last words, where it fails.

    `time_first` asks for the time to the first token where the peer must run once more for it.
    """
    from benchmarks.random_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / subject.name
        write_checkpoint(checkpoint, subject.config, subject.recipe, seed=subject.seed, device=subject.device)
        job = {
            "peer": options.peer,
            "checkpoint": str(checkpoint),
            "weights": subject.recipe.weights,
            "kv": subject.recipe.kv,
            "dtype": str(subject.dtype).removeprefix("torch."),
            "device": subject.device,
            "session_len": max(longest(case) for case in cases) + 1,
            "at_once": at_once,
            "time_first": time_first,
            "cases": [[[request.prompt_ids, request.new_tokens] for request in case] for case in cases],
        }
        file = Path(temporary) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [options.python, "-P", "-m", "benchmarks.peer_process", str(file)]
        # Nothing is to be reported to anybody, nor fetched: the model is here.
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT), "TM_LOG_LEVEL": "ERROR"}
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    results = [json.loads(line[len(MARK) :]) for line in answer.stdout.splitlines() if line.startswith(MARK)]
    # One that has answered everything may fall over at its end.
    if len(results) < len(cases):
        last = answer.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"{options.peer} ended with exit code {answer.returncode} before it had answered: {last[0]}")
    return [
        Run(
            timeline=Timeline(
                seconds=result["seconds"], tokens=result["tokens"], first=result["first"], steps=result["steps"]
            ),
            engine=f"{MODULES[str(options.peer)]} {result['version']}",
            load_seconds=result["load_seconds"],
        )
        for result in results
    ]
