"""Runs stages in processes that are killed: forked from one that has loaded the libraries and computed nothing.

    python tests/pipelines/killed_stage.py REQUEST...

A REQUEST is JSON: {"stage": module, "argv": [...], "unfinished": folder, "kills": [for each run that is killed: after
how many kept layers, or after how many seconds if it is a float]}. One more run comes to its end. Prints a JSON list
for each request, of what each of its runs said on standard error.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path


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
    from pipelines import slices
    from pipelines.quant import resume

    resume.SHARE = 1e9  # keep every layer, however quick it is
    try:
        return slices.run_stage(importlib.import_module(request["stage"]).work, request["argv"])
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
    print(json.dumps([[run(request, kill) for kill in [*request["kills"], None]] for request in requests]))
