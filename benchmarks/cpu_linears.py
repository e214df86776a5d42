"""`ingot bench cpu_linears`: int4 and int8 linears of a CPU beside float32 ones and torch's packed operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, check_out, provenance, record

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = """
One linear of each size, as a layer of a 7B model has them, in float32 by torch, in int4 and int8 by the engine's C
kernels and by torch's packed operators (which take bfloat16), over weights that do not fit into a cache. They take
turns in one run, so that other work on the machine meets all of them; one thread is timed by the processor's clock,
several by the wall's, in the turns in which nothing else had to run. `times_float32` compares the best of each,
`times_float32_median` the medians. `share_of_read` is the speed at which the weights are read, scales included, as a
share of what reading a large tensor reaches in the same turns.
"""
SIZES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
GROUP_SIZE = 128
# Weights are rotated over so many bytes, beyond a cache of 32 MB.
ROTATED_BYTES = 100_000_000
READ_BYTES = 256_000_000
SHOWN = (
    "size",
    "rows",
    "threads",
    "clock",
    "turns",
    "implementation",
    "microseconds",
    "times_float32",
    "times_float32_median",
    "gb_s",
    "share_of_read",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    rows: tuple[int, ...] = option((1, 4, 16), "tokens of a step", least=1)
    outputs: int = option(0, "one size alone, with `inputs`; 0 is the four of a 7B layer", least=0)
    inputs: int = option(0, "see outputs", least=0)
    seconds: float = option(8.0, "of turns for each size and number of rows", least=0)
    torch_packed: bool = option(True, "torch's int4 and int8 operators too")
    out: Path = option(RESULTS / "cpu_linears.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench cpu_linears", about=ABOUT)
    check_out(options.out)
    import torch

    from benchmarks.turns import take_turns
    from engine.kernels import cpu_linear

    if bool(options.outputs) != bool(options.inputs):
        raise ValueError("outputs and inputs go together: give both, or none of them.")
    if options.outputs % 16 or options.inputs % GROUP_SIZE:
        raise ValueError(f"outputs must be a multiple of 16 and inputs one of {GROUP_SIZE}.")
    if cpu_linear.functions() is None:
        raise ValueError("there are no compiled kernels to measure here.")
    sizes = ((options.outputs, options.inputs),) if options.outputs else SIZES
    memory = torch.ones(READ_BYTES // 4)
    for outputs, inputs in sizes:
        weights = _weights(outputs, inputs, torch_packed=options.torch_packed)
        for rows in options.rows:
            runs = _runs(weights, rows, outputs, inputs)
            with torch.inference_mode():
                found = take_turns(
                    {"read": memory.sum, **runs}, seconds=options.seconds, threads=torch.get_num_threads()
                )
            read = READ_BYTES / found.pop("read").best
            for name, turns in found.items():
                size = sum(tensor.nbytes for tensor in weights[name][0])
                row = {
                    **provenance(),
                    "instructions": torch.backends.cpu.get_cpu_capability(),
                    "threads": torch.get_num_threads(),
                    "size": f"{outputs}x{inputs}",
                    "rows": rows,
                    "implementation": name,
                    "clock": turns.clock,
                    "turns": len(turns.seconds),
                    "microseconds": round(turns.best * 1e6, 1),
                    "median_microseconds": round(turns.median * 1e6, 1),
                    "times_float32": round(found["float32"].best / turns.best, 2),
                    "times_float32_median": round(found["float32"].median / turns.median, 2),
                    "gb_s": round(size / turns.best / 1e9, 2),
                    "read_gb_s": round(read / 1e9, 2),
                    "share_of_read": round(size / turns.best / read, 3),
                    "gflops": round(2 * rows * outputs * inputs / turns.best / 1e9, 1),
                }
                record(options.out, row, SHOWN)
    return 0


def _weights(outputs: int, inputs: int, *, torch_packed: bool) -> dict[str, list[tuple[Tensor, ...]]]:
    """For each implementation as many random weights as do not fit into a cache, each as its tensors."""
    import torch

    from engine.kernels.cpu_linear import CpuInt4Weights

    groups = inputs // GROUP_SIZE
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    int8 = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    words = torch.randint(-(2**31), 2**31, (inputs, outputs // 8), dtype=torch.int32)
    packed = CpuInt4Weights.pack(words, words[:groups], torch.rand(groups, outputs).half() * 0.01).packed
    found: dict[str, tuple[Tensor, ...]] = {
        "float32": (torch.randn(outputs, inputs),),
        "int4": (packed,),
        "int8": (int8, torch.rand(outputs)),
    }
    if torch_packed:
        found["torch int4, bfloat16"] = (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
            torch.rand(groups, outputs, 2).bfloat16(),
        )
        found["torch int8, bfloat16"] = (int8, torch.rand(outputs).bfloat16())
    copies = {name: -(-ROTATED_BYTES // sum(part.nbytes for part in parts)) for name, parts in found.items()}
    return {
        name: [parts, *(tuple(part.clone() for part in parts) for _ in range(copies[name] - 1))]
        for name, parts in found.items()
    }


def _runs(
    weights: dict[str, list[tuple[Tensor, ...]]], rows: int, outputs: int, inputs: int
) -> dict[str, Callable[[], object]]:
    import torch

    from engine.kernels import cpu_linear
    from engine.kernels.reference import quantize_rows

    x = torch.randn(rows, inputs)
    half, (values, scales) = x.bfloat16(), quantize_rows(x)

    def int4(packed: Tensor) -> Tensor:
        return cpu_linear.int4_linear(x, cpu_linear.CpuInt4Weights(packed, outputs, inputs, GROUP_SIZE))

    calls: dict[str, Callable[..., object]] = {
        "float32": lambda weight: torch.nn.functional.linear(x, weight),
        "int4": int4,
        "int8": lambda weight, by: cpu_linear.int8_linear(values, scales, weight, by, None, torch.float32),
        "torch int4, bfloat16": lambda weight, by: torch.ops.aten._weight_int4pack_mm_for_cpu(
            half, weight, GROUP_SIZE, by
        ),
        "torch int8, bfloat16": lambda weight, by: torch.ops.aten._weight_int8pack_mm(half, weight, by),
    }

    def rotating(name: str) -> Callable[[], object]:
        turn, call = cycle(weights[name]), calls[name]
        return lambda: call(*next(turn))

    return {name: rotating(name) for name in weights}
