"""`ingot bench kernels`: every kernel by itself, and the share of what the device can do that it reaches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, check_out, provenance, record
from benchmarks.shapes import SHAPES, shape

ABOUT = """
Each kernel at the sizes that a layer of a model's shape has, one row a size and implementation: the reference in plain
torch, and the Triton kernels where there is a GPU. A row has the time of one call, GB/s and TFLOP/s by what cannot be
avoided (every input and output once, two operations a multiplied pair), and the share of the ceilings of the device,
which are measured in the same run: `bound` says which of the two is nearer. On a GPU calls are timed as one CUDA graph
over inputs that do not fit into its cache.
"""
SHOWN = ("kernel", "size", "implementation", "microseconds", "gb_s", "tflops", "bound", "share")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    shape: str = option("internlm7b", "the model whose sizes are taken", choices=tuple(SHAPES))
    kernels: tuple[str, ...] = option(("all",), "which ones, by name")
    tokens: tuple[int, ...] = option((1, 64), "rows of a step; for attention, sequences", least=1)
    context: int = option(1024, "cached tokens of a sequence", least=1)
    group_size: int = option(128, "inputs that share an int4 scale", least=1)
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU where there is one")
    dtype: str = option(
        "auto",
        "values; auto is float16 on a GPU and float32 on a CPU",
        choices=("auto", "float16", "bfloat16", "float32"),
    )
    out: Path = option(RESULTS / "kernels.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench kernels", about=ABOUT)
    check_out(options.out)
    import torch

    from benchmarks.ceilings import measure_ceilings
    from benchmarks.kernel_registry import Setting, cases, kernels
    from benchmarks.kernel_timing import rotated, seconds_of
    from benchmarks.subject import find_device

    device = find_device(options.device)
    dtype = {"auto": "float16" if device.startswith("cuda") else "float32"}.get(options.dtype, options.dtype)
    chosen = kernels() if options.kernels == ("all",) else options.kernels
    settings = [
        Setting(
            config=shape(options.shape),
            tokens=tokens,
            context=options.context,
            group_size=options.group_size,
            device=device,
            dtype=getattr(torch, dtype),
        )
        for tokens in options.tokens
    ]
    # Some do not depend on the rows of a step: once is enough.
    todo = {(case.kernel, case.size): case for name in chosen for each in settings for case in cases(name, each)}
    ceilings = measure_ceilings(device, getattr(torch, dtype))
    for case in todo.values():
        sets = rotated(case.inputs, case.bytes, device)
        for name, run in case.run.items():
            with torch.inference_mode():
                seconds, timing = seconds_of(run, sets, device, eager=name in case.eager)
            fastest = ceilings.int8 if case.int8 and ceilings.int8 else ceilings.matmul
            by_bytes, by_operations = case.bytes / ceilings.copy, case.operations / fastest
            row = {
                **provenance(device),
                "model": options.shape,
                "dtype": dtype,
                "kernel": case.kernel,
                "size": case.size,
                "implementation": name,
                "timing": timing,
                "microseconds": round(seconds * 1e6, 3),
                "gb_s": round(case.bytes / seconds / 1e9, 1),
                "tflops": round(case.operations / seconds / 1e12, 3),
                **ceilings.columns,
                "bound": "memory" if by_bytes >= by_operations else "products",
                "share": round(max(by_bytes, by_operations) / seconds, 4),
            }
            record(options.out, row, SHOWN)
        del sets
    return 0
