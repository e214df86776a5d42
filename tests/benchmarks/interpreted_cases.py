"""Runs every case with Triton's interpreter beside the reference; prints those that differ. Run by test_kernels.py."""

import importlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import kernel_registry
from benchmarks.shapes import shape

found = kernel_registry.implementations


def all_implementations(op, device, *modules, reference=kernel_registry.REFERENCE):
    return found(op, "cuda", *modules, reference=reference)


for name in kernel_registry.MODULES:
    importlib.import_module(name).implementations = all_implementations
setting = kernel_registry.Setting(
    config=shape("tiny"), tokens=3, context=70, group_size=64, device="cpu", dtype=torch.float16
)
compared = 0
for kernel in kernel_registry.kernels():
    for case in kernel_registry.cases(kernel, setting):
        results = []
        for run in case.run.values():
            torch.manual_seed(1)
            result = run(*case.inputs())
            results.append([each.float() for each in (result if isinstance(result, tuple) else (result,))])
        for other in results[1:]:
            compared += 1
            for ours, theirs in zip(results[0], other, strict=True):
                if not torch.allclose(ours, theirs, atol=0.01, rtol=0.01):
                    print("differs:", kernel, case.size, float((ours - theirs).abs().max()))
print("compared", compared)
