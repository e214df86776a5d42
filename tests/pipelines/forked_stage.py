"""Runs stages in processes of their own, forked from one that has loaded the libraries and computed nothing.

    python tests/pipelines/forked_stage.py REQUEST...

A REQUEST is JSON: {"stage": module, "argv": [...], "kills": [for each run that is killed: after how many kept layers,
or after how many seconds if it is a float], "unfinished": where layers are kept, "folder": where to run (here without
it), "threads": how many, on as many processors}. One more run comes to its end. Prints a JSON list for each request,
of what each of its runs said on standard error.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_forked(*requests):
    """For each request, what each of its runs said."""
    done = subprocess.run(
        [sys.executable, __file__, *map(json.dumps, requests)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(request, kill):
    """What one run said. RuntimeError where it came to its end before it was to be killed, or to a bad one."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            os._exit(work(request))
        begun, status = time.monotonic(), None
        while status is None:
            process, status = os.waitpid(child, os.WNOHANG)
            if process == 0:
                status = None
                if kill is not None and is_time(request, kill, time.monotonic() - begun):
                    os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
                time.sleep(0.001)
        said.seek(0)
        text = said.read().decode()
    early = isinstance(kill, int) and not os.WIFSIGNALED(status)
    if early or (kill is None and status != 0):
        raise RuntimeError(f"{request} with kill={kill} ended with status {status}: {text}")
    return text


def work(request):
    import torch

    from pipelines import slices
    from pipelines.quant import resume

    resume.SHARE = 1e9  # keep every layer, however quick it is
    os.chdir(request.get("folder", "."))
    if threads := request.get("threads"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        torch.set_num_threads(threads)
    try:
        return slices.run_stage(importlib.import_module(request["stage"]).work, request["argv"], on_gpus=True)
    finally:
        sys.stderr.flush()


def is_time(request, kill, seconds):
    if isinstance(kill, float):
        return seconds >= kill
    return len(list(Path(request["unfinished"]).glob("*/*.json"))) >= kill


if __name__ == "__main__":
    requests = [json.loads(text) for text in sys.argv[1:]]
    for module in (
        "torch",
        "safetensors.torch",
        "tokenizers",
        "pipelines.quant.w4a16",
        *(r["stage"] for r in requests),
    ):
        importlib.import_module(module)
    print(json.dumps([[run(request, kill) for kill in [*request.get("kills", ()), None]] for request in requests]))
