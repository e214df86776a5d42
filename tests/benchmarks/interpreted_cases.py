"""Runs every case, and attention as it is tuned, with Triton's interpreter beside the reference; prints those that
differ. Run by test_kernels.py."""

import importlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks import attention_cases, kernel_registry, tune_attention
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

tune_attention.CHECKED = (70, 17, 1)
tried = {"block": 32, "stages": 2, "warps": 4}
for kv in attention_cases.CACHES:
    for splits in (1, 2):
        if wrong := tune_attention.problem(setting.config, "cpu", (kv, splits, tried)):
            print("differs: attention as it is tuned,", kv, splits, wrong)
layer = tune_attention.Layer(setting.config, "cpu", "kv8", (70, 5))
normed = layer.run(1, tried).float()
if not torch.allclose(normed.square().mean(1), torch.ones(2), atol=0.01):
    print("attention is not normed", normed.square().mean(1))
if tune_attention.problem(setting.config, "cpu", ("kv8", 1, {"block": 3, "stages": 2, "warps": 4})) is None:
    print("a configuration that cannot be is right")
lens = tune_attention.unequal(64, 1024)
if lens != sorted(lens, reverse=True) or abs(sum(lens) / 64 - 1024) > 20 or lens[0] < 3000:
    print("unequal contexts", lens)
print("compared", compared)
