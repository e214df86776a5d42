"""`ingot bench BENCHMARK [KEY=VALUE ...]`: measurements that anybody can repeat."""

from __future__ import annotations

import difflib
import importlib
import sys

BENCHMARKS = {
    "generation": (
        "benchmarks.generation",
        "fixed lengths at several batch sizes: tokens a second, share of the floor",
    ),
    "kernels": ("benchmarks.kernels", "each kernel by itself: time, GB/s or TFLOP/s, share of the device's ceilings"),
    "cold": ("benchmarks.cold", "from the start of a process to the first token of a workspace"),
    "collectives": ("benchmarks.collectives", "what tensor-parallel ranks say to each other in a step, and its time"),
    "cpu_decode": ("benchmarks.cpu_decode", "decode steps on a CPU by turns: recipes, transformers, llama.cpp"),
    "cpu_linears": ("benchmarks.cpu_linears", "int4 and int8 linears on a CPU beside float32 ones, by turns"),
    "memory": ("benchmarks.memory", "memory against batch size, KV cache as computed and as int8"),
    "profile": ("benchmarks.host_time", "how much of a decode step the host takes, and where"),
    "serving": ("benchmarks.serving", "through HTTP at request rates: latencies, and what HTTP costs"),
    "table": ("benchmarks.table", "every recipe over the cases that engines are compared by"),
    "throughput": ("benchmarks.throughput", "many requests of different lengths: requests and tokens a second"),
    "tune": ("benchmarks.tune", "find the fastest configurations of the kernels on this GPU and write its table"),
    "workspace": ("benchmarks.workspace", "write a named shape with random weights as a workspace folder"),
    "plot": ("benchmarks.plots", "draw the rows of a benchmark"),
}


def main(argv: list[str]) -> int:
    """Run one benchmark and return the exit code; ValueError for one that is not there."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name = argv[0]
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        meant = f"Did you mean `ingot bench {near[0]}`? " if near else ""
        raise ValueError(f"there is no benchmark {name!r}. {meant}`ingot bench --help` lists them.")
    return int(importlib.import_module(BENCHMARKS[name][0]).main(argv[1:]))


def overview() -> str:
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in BENCHMARKS.items()]
    return "\n".join(
        ["usage: ingot bench BENCHMARK [KEY=VALUE ...]", "", *lines, "", "`ingot bench BENCHMARK --help` says more."]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
