import os
import platform
import subprocess
import sys

import pytest

if platform.libc_ver()[0] != "glibc":
    pytest.skip("only glibc's heap is told what to keep", allow_module_level=True)

# What a step does: four blocks are taken, written and freed, 120 MB together. Prints the page faults of ten such. The
# blocks are C's own, since a tensor's small parts may come to lie at the end of the heap, which then cannot shrink.
STEPS = """
import ctypes, resource
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
def step():
    blocks = [libc.malloc(30_000_000) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, 30_000_000)
    while blocks:
        libc.free(blocks.pop())
for _ in range(6):
    step()
faults = -resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(faults + resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
ENGINE = """
from engine.config import EngineConfig
from engine.runtime.engine import Engine
from tests.engine.runtime.tiny_model import CharTokenizer, tiny_model
kept = Engine(tiny_model(device="cpu"), CharTokenizer(), EngineConfig(), session_len=32)
"""


def faults(before: str, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
        env={**plain, **environment},
    )
    return int(done.stdout)


def test_an_engine_on_a_cpu_keeps_what_its_steps_free():
    given_back = faults("")
    assert given_back > 200  # were it kept without us, this test could not fail
    assert faults(ENGINE) < given_back / 10


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_sets_stays(environment):
    told = "from engine.runtime.heap import keep_freed_memory\nassert not keep_freed_memory()"
    assert faults(told, **environment) > 200
