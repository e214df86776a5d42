"""How fast a device copies memory and multiplies matrices, measured in the run whose figures are compared with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 7
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
MATRIX = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """`copy`: bytes a second that a copy reads and writes together. `matmul`: operations a second of a square product
    in the computing type (8192 wide on a GPU, 1024 on a CPU), and `int8` of one in int8, on a GPU."""

    copy: float
    matmul: float
    int8: float | None = None

    @property
    def columns(self) -> dict[str, object]:
        """What a row says about them."""
        return {
            "copy_gb_s": round(self.copy / 1e9, 1),
            "matmul_tflops": round(self.matmul / 1e12, 3),
            "int8_tops": "" if self.int8 is None else round(self.int8 / 1e12, 3),
        }


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measured now, the median of seven; takes about a second, and 4 GiB of a GPU for that time."""
    kind = torch.device(device).type
    copy = _copy_speed(device)
    matmul = _matmul_speed(device, dtype)
    int8 = _int8_speed(device) if kind == "cuda" else None
    if kind == "cuda":
        torch.cuda.empty_cache()  # what is measured next sizes its KV cache by what is free
    return Ceilings(copy=copy, matmul=matmul, int8=int8)


def _copy_speed(device: str) -> float:
    source = torch.zeros(COPY_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device)


def _matmul_speed(device: str, dtype: torch.dtype) -> float:
    size = MATRIX[torch.device(device).type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device)


def _int8_speed(device: str) -> float:
    size = MATRIX["cuda"]
    left, right = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: torch._int_mm(left, right.t()), device)


def median_seconds(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """The median time of `work` after one run that is not counted; on a GPU, that of its stream."""
    work()
    if torch.device(device).type == "cpu":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
