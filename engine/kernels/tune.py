"""Finds the fastest configuration of every matrix product on this GPU and writes the table that serving reads."""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels import dense_linear, int4_linear, int8_linear, normed_linear, reference, tuning
from engine.kernels.device import facts
from engine.kernels.int4_weights import FLOAT16_1024, TILE_INPUTS, TILE_ROWS, Int4Weights
from engine.kernels.tuning import Config

# N x K of the products of a layer and of the head: InternLM-7B's, then those of Llama-3-8B.
SHAPES = (
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
)
HEAD = (103168, 4096)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GROUP_SIZE = 128
# Weights that a measurement goes round: several times what the L2 cache holds, so that each is read from memory.
ROTATED_BYTES = 400_000_000
LAUNCHES = 32
REPLAYS = 5
MODULES = {"int4_linear": int4_linear, "int8_linear": int8_linear, "dense_linear": dense_linear}
# The same of what is made of rows first: the norm of the residual stream, or int8 rows of floats or of gate and up.
NORMED = {"normed_int4_linear": "int4_linear", "normed_int8_linear": "int8_linear"}
ROUNDED = {"rounded_int8_linear": "int8_linear", "gated_int8_linear": "int8_linear"}
FUSED = {**NORMED, **ROUNDED}
EPS = 1e-5
# That compile and check configurations at once, each with a context on the GPU.
MOST_PROCESSES = 12
LARGEST_ERROR = 2e-2


@dataclass
class Product:
    """One operation at one N and K over random weights; enough copies of them that no cache holds all."""

    op: str
    n: int
    k: int
    device: torch.device
    dtype: torch.dtype = torch.float16
    rotated_bytes: int | None = None  # None: ROTATED_BYTES

    def __post_init__(self) -> None:
        self.kind = FUSED.get(self.op, self.op)
        self.generator = torch.Generator(self.device).manual_seed(0)
        first = self._weight()
        self.weight_bytes = sum(tensor.nbytes for tensor in _tensors(first))
        copies = max(1, min(64, (self.rotated_bytes or ROTATED_BYTES) // self.weight_bytes))
        self.weights = [first, *(self._weight() for _ in range(copies - 1))]
        self._inputs: dict[int, tuple[Tensor, ...]] = {}
        self._products: dict[int, Tensor] = {}

    def inputs(self, m: int) -> tuple[Tensor, ...]:
        """x of m rows as the operation takes it; of one of NORMED a delta, the stream and the norm's weight."""
        if m not in self._inputs:
            x = self._normal(m, 2 * self.k if self.op == "gated_int8_linear" else self.k)
            if self.op in NORMED:
                self._inputs[m] = x, self._normal(m, self.k), self._normal(self.k)
            else:
                self._inputs[m] = reference.quantize_rows(x) if self.op == "int8_linear" else (x,)
        return self._inputs[m]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(self.dtype)

    def run(self, m: int, copy: int, config: Config | None) -> Tensor:
        weight = self.weights[copy % len(self.weights)]
        x = self.inputs(m)
        if self.op == "normed_int4_linear":
            return normed_linear.normed_int4_linear(x[0], x[1], x[2], EPS, weight, None, config)[0]
        if self.op == "normed_int8_linear":
            return normed_linear.normed_int8_linear(x[0], x[1], x[2], EPS, weight[0], weight[1], None, config)[0]
        if self.op in ROUNDED:
            run = getattr(normed_linear, self.op)
            y: Tensor = run(x[0], weight[0], weight[1], None, config)
            return y
        if self.op == "int4_linear":
            return int4_linear.int4_linear(x[0], weight, None, config)
        if self.op == "int8_linear":
            return int8_linear.int8_linear(x[0], x[1], weight[0], weight[1], None, self.dtype, config)
        return dense_linear.dense_linear(x[0], weight, None, config)

    def error(self, m: int, config: Config | None) -> float:
        """|y - exact| / |exact| over the first weight; infinite where y has a number that is not finite."""
        exact = self._exact(m)
        y = self.run(m, 0, config).float()
        error = float((y - exact).norm() / exact.norm())
        return error if bool(torch.isfinite(y).all()) else float("inf")

    def _exact(self, m: int) -> Tensor:
        if m not in self._products:
            x, weight = self.inputs(m), self.weights[0]
            if self.kind == "int8_linear":
                if self.op in NORMED:
                    x = reference.rms_norm_int8(x[0] + x[1], x[2], EPS)
                elif self.op in ROUNDED:
                    gated = self.op == "gated_int8_linear"
                    x = reference.silu_and_mul_int8(x[0]) if gated else reference.quantize_rows(x[0])
                exact = reference.int8_linear(x[0], x[1], weight[0], weight[1], None, torch.float32)
            else:
                dense = weight.dequantize(torch.float32) if self.kind == "int4_linear" else weight.float()
                rows = reference.rms_norm(x[0] + x[1], x[2], EPS) if self.op in NORMED else x[0]
                exact = rows.float() @ dense.t()
            self._products = {m: exact}
        return self._products[m]

    def moved_bytes(self, m: int) -> int:
        """What the product must at least move: weights and x read once, y written once."""
        return self.weight_bytes + sum(x.nbytes for x in self.inputs(m)) + m * self.n * self.dtype.itemsize

    def candidates(self, m: int) -> list[Config]:
        device = facts(self.device)
        if self.op in FUSED:
            if self.kind == "int4_linear":
                return list(normed_linear.int4_candidates(m, self.n, self.k, device))
            return list(normed_linear.int8_candidates(m, device))
        return list(MODULES[self.op].candidates(m, self.n, self.k, device))

    def _weight(self) -> Any:
        integers: dict[str, Any] = {"device": self.device, "generator": self.generator}
        if self.kind == "int4_linear":
            tiles, tile_inputs = -(-self.n // TILE_ROWS), -(-self.k // TILE_INPUTS)
            words = torch.randint(-(2**31), 2**31, (tiles, tile_inputs, 2, 4, 8, 4, 2, 2), **integers).to(torch.int32)
            shape = (tiles, tile_inputs * TILE_INPUTS // GROUP_SIZE, 4, 8, 2)
            scale = (torch.rand(shape, **integers) * 0.02 + 0.01).half().view(torch.int16).to(torch.int32)
            zero = torch.randint(0, 16, shape, **integers).to(torch.int32)
            return Int4Weights(words, scale | ((zero | FLOAT16_1024) << 16), self.n, self.k, GROUP_SIZE)
        if self.kind == "int8_linear":
            weight = torch.randint(-127, 128, (self.n, self.k), dtype=torch.int8, **integers)
            return weight, torch.rand(self.n, **integers) * 1e-3 + 1e-3
        return torch.randn(self.n, self.k, dtype=self.dtype, **integers) * 0.02


def _tensors(weight: Any) -> tuple[Tensor, ...]:
    if isinstance(weight, Int4Weights):
        return weight.words, weight.scale_zero
    return weight if isinstance(weight, tuple) else (weight,)


def microseconds(call: Callable[[int], object], launches: int = LAUNCHES, replays: int = REPLAYS) -> float:
    """Time of call(i), i from 0 to launches - 1, a call: the median of replays of one CUDA graph of them all."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)  # compiles and allocates what a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    times: list[float] = []
    for replay in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay:  # the first one loads the graph
            times.append(start.elapsed_time(end) * 1000 / launches)
    return statistics.median(times)


def time_product(product: Product, m: int, config: Config | None) -> float:
    """Microseconds of one product, launched one after the other over the copies of the weight."""
    copies = len(product.weights)
    launches = LAUNCHES if copies <= LAUNCHES else copies
    return microseconds(lambda i: product.run(m, i, config), launches)


def tune(
    device: torch.device | str = "cuda",
    seconds: float = 600.0,
    shapes: Sequence[tuple[int, int]] = (*SHAPES, HEAD),
    rows: Sequence[int] = ROWS,
    operations: Sequence[str] = (*MODULES, *FUSED),
    folder: Path = tuning.TABLES,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Times the configurations of the operations at every shape and number of rows, and writes the device's table.

    Configurations are compiled and checked by several processes at once, then timed by this one alone. `report` is
    given one line a product. What is not reached within `seconds` keeps its former row, or none. A configuration that
    fails or whose result is wrong is left out.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"kernels are tuned on a GPU; the device given is {device}")
    deadline = time.monotonic() + seconds
    found = []
    with processes() as pool:
        for n, k in shapes:
            # What writes the residual stream has no more outputs than inputs, and reads no norm.
            possible = ["dense_linear"] if (n, k) == HEAD else [*MODULES, *(NORMED if n > k else ROUNDED)]
            for op in [op for op in possible if op in operations and time.monotonic() < deadline]:
                product = Product(op, n, k, device)
                asked = [m for m in rows if op in MODULES or m <= normed_linear.MOST_ROWS]
                cases = [(m, config) for m in asked for config in product.candidates(m)]
                checks = all_checked(pool, functools.partial(_check, op, n, k, device), cases)
                right: dict[int, list[Config]] = {}
                for (m, config), problem in zip(cases, checks, strict=True):
                    if problem is None:
                        right.setdefault(m, []).append(config)
                    else:
                        report(f"{op} {n}x{k} M={m} {config}: {problem}")
                for m, configs in right.items():
                    timed = [(time_product(product, m, c), c) for c in configs if time.monotonic() < deadline]
                    if len(timed) == len(configs):
                        us, config = min(timed, key=_time)
                        found.append({"op": op, "n": n, "k": k, "m": m, "us": round(us, 2), "config": config})
                        report(f"{op} {n}x{k} M={m}: {us:.1f} us, {config}")
                del product
                torch.cuda.empty_cache()
    return tuning.write(facts(device).name, found, versions(), folder)


def processes() -> ProcessPoolExecutor:
    """Processes that compile and check configurations at once, for a process that then times them alone."""
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1))
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def all_checked(
    pool: ProcessPoolExecutor, check: Callable[[Any], str | None], cases: Sequence[Any]
) -> list[str | None]:
    """What is wrong with each case. ValueError where a process died of one: a compiler may end the one it runs in."""
    try:
        return list(pool.map(check, cases))
    except BrokenProcessPool:
        raise ValueError(
            "a process that compiled and checked configurations has died, so tuning ends here: either a compiler "
            "crashed on one of them, or memory ran out. The table keeps the rows that it has."
        ) from None


@functools.lru_cache(maxsize=1)
def _checked(op: str, n: int, k: int, device: torch.device) -> Product:
    return Product(op, n, k, device, rotated_bytes=1)


def _check(op: str, n: int, k: int, device: torch.device, case: tuple[int, Config]) -> str | None:
    """What is wrong with a configuration; compiles it into the cache on disk, for the process that times."""
    m, config = case
    try:
        error = _checked(op, n, k, device).error(m, config)
    except Exception as problem:  # what a compiler or a launch says of one configuration
        return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
    return None if error < LARGEST_ERROR else f"error {error}"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}


def _time(timed: tuple[float, Config]) -> float:
    return timed[0]
