r"""The matrix products of the GPU engine: checked, timed against cuBLAS and the floor, and tuned. One command, one GPU.
(Above 300 lines: one script, of which every process runs a part.)

Every family of kernels runs in processes of its own, so that one that fails takes no other with it. First all are
compiled and checked side by side: at odd sizes, then every configuration at its real size. Then they are timed one
after the other, in CUDA graphs over rotated weights. Left in the folder: gemm.csv (a row a configuration), best.csv,
checks.txt, logs, and the table of the device for engine/kernels/tuned/. The compact table is printed last.

    python -m benchmarks.gemm_probe [--seconds 240] [--out "$OUT"] [--families int4:gluon int8] [--rows 1 16 64]

One form beside what the table chooses now and cuBLAS, in 100 s; the table has the better one:
    python -m benchmarks.gemm_probe --seconds 100 --families cublas int8:now int8:shared --rows 16 32 64 128 256 \
        --shapes 12288x4096 22016x4096 4096x11008 4096x4096
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAMILIES = (
    "cublas",
    "int4:gemv",
    "int4:gluon",
    "int4:triton",
    "int4:dense",
    "int8:columns",
    "int8:shared",
    "int8:tiles",
    "int8:library",
    "dense:rows",
    "dense:columns",
)
# Not by default: what the table of the device chooses now, to measure one other family beside it.
NOW = ("int4:now", "int8:now")
# Processes that compile and check a family side by side, and its relative share of the time for measuring; else 1, 2.
WORK = {
    "cublas": (0, 2),
    "int4:gluon": (6, 5),
    "int4:gemv": (2, 2),
    "int8:columns": (4, 4),
    "int8:shared": (6, 5),
    "int8:tiles": (2, 3),
    "dense:columns": (4, 3),
}
# The rows of x that decide first; the others follow in the time that is left.
FIRST_ROWS = (1, 16, 64, 256, 2048)
SHARE_OF_CHECKS = 0.4
BANDWIDTH, FLOPS, INT8_OPS = 4.28e12, 790e12, 1580e12
SPLIT_NAMES = {"int4": "int4_linear", "int8": "int8_linear", "dense": "dense_linear"}
COLUMNS = ["family", "op", "n", "k", "m", "us", "error", "tb_s", "tflop_s", "config"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything (default 240)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "/tmp/gemm_probe")))
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES + NOW, metavar="FAMILY")
    parser.add_argument("--rows", nargs="*", type=int, default=[], help="numbers of rows of x (default: all)")
    parser.add_argument("--shapes", nargs="*", default=[], metavar="NxK", help="default: those of engine.kernels.tune")
    parser.add_argument("--worker", nargs=4, metavar=("PHASE", "FAMILY", "SHARD", "SECONDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        phase, family, shard, seconds = given.worker
        index, count = (int(part) for part in shard.split("/"))
        {"check": check, "time": measure}[phase](family, index, count, float(seconds), given)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    checks_end = started + given.seconds * SHARE_OF_CHECKS
    workers = []
    for stale in (*given.out.glob("check-*.log"), *given.out.glob("rows-*.jsonl")):
        stale.unlink()
    for family in given.families:
        processes = WORK.get(family, (1, 2))[0]
        for index in range(processes):
            shard = f"{index}/{processes}"
            workers.append(start(given, "check", family, shard, checks_end - time.monotonic()))
    for worker in workers:
        wait(worker, checks_end + 20 - time.monotonic())
    lines = sorted(line for path in sorted(given.out.glob("check-*.log")) for line in path.read_text().splitlines())
    (given.out / "checks.txt").write_text("\n".join(lines) + "\n")
    failed = [line for line in lines if line.startswith("FAIL")]
    passed = sum(line.startswith("PASS") for line in lines)
    print(f"checks: {passed} passed, {len(failed)} failed ({time.monotonic() - started:.0f} s)")
    for line in failed[:30]:
        print(line[:300])
    left, number = list(given.families), 0
    while left:  # one process measures all, and another goes on behind the family that ended it
        remaining = started + given.seconds - time.monotonic()
        if number and remaining < 15:
            break
        worker = start(given, "time", ",".join(left), f"{number}/1", max(20.0, remaining))
        wait(worker, max(40.0, remaining + 30))
        progress = (given.out / f"progress-{number}.txt").read_text().split()
        left = left[len(progress) :] if progress else []
        left, number = (left if worker.returncode else []), number + 1
    summarize(given.out)
    print(f"{time.monotonic() - started:.0f} s in all")


def start(given: argparse.Namespace, phase: str, family: str, shard: str, seconds: float) -> subprocess.Popen[bytes]:
    log = given.out / f"{phase}-{family.split(',')[0].replace(':', '-')}-{shard.split('/')[0]}.log"
    command = [sys.executable, "-m", "benchmarks.gemm_probe", "--out", str(given.out)]
    command += ["--rows", *map(str, given.rows), "--shapes", *given.shapes]
    command += ["--worker", phase, family, shard, f"{seconds:.0f}"]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def wait(worker: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        code: int | str = worker.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        code = "out of time"
    if code:
        print(f"worker {' '.join(map(str, worker.args[-4:]))}: {code}")  # type: ignore[index]


def cases(family: str, given: argparse.Namespace) -> Iterator[tuple[Any, int, list[Any]]]:
    """(product, rows of x, configurations of the family), what decides first at the front; one product at a time."""
    import torch

    from engine.kernels import tune, tuning
    from engine.kernels.device import facts

    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes]
    shapes = shapes or [*tune.SHAPES, *([tune.HEAD] if family in ("cublas", "dense:rows", "dense:columns") else [])]
    kind, _, kernel = family.partition(":")
    for rows in (FIRST_ROWS, [m for m in tune.ROWS if m not in FIRST_ROWS]):
        for n, k in shapes:
            chosen = [m for m in rows if not given.rows or m in given.rows]
            if not chosen:
                continue
            if family == "cublas":
                yield tune.Product("dense_linear", n, k, torch.device("cuda")), 0, chosen
                continue
            product = None
            for m in chosen:
                device = facts(torch.device("cuda"))
                if family in NOW:
                    chosen_now = tuning.lookup(SPLIT_NAMES[kind], device.name, n, k, m)
                    if chosen_now is None and kind == "int8":
                        chosen_now = tune.MODULES["int8_linear"].default_config(m, n, k, device)
                    configs = [] if chosen_now is None else [chosen_now]
                else:
                    probe = tune.MODULES[SPLIT_NAMES[kind]].candidates(m, n, k, device)
                    configs = [config for config in probe if config["kernel"] == kernel]
                if configs:
                    product = product or tune.Product(SPLIT_NAMES[kind], n, k, torch.device("cuda"))
                    yield product, m, configs
            del product
            torch.cuda.empty_cache()


def check(family: str, index: int, count: int, seconds: float, given: argparse.Namespace) -> None:
    """Prints PASS or FAIL a case; compiles every configuration on the way, so that measuring finds it in the cache."""
    from engine.kernels import tune

    deadline = time.monotonic() + seconds
    if family == "cublas":
        return
    if family not in NOW:
        odd_sizes(family, index, count, deadline)
    tune.ROTATED_BYTES = 1
    number = 0
    for product, m, configs in cases(family, given):
        product.weights = product.weights[:1]
        for config in configs:
            number += 1
            if number % count != index:
                continue
            if time.monotonic() > deadline:
                print(f"LATE {family}: not all configurations were checked")
                return
            verify(f"{family} {product.n}x{product.k} M={m} {json.dumps(config)}", product, m, config)


def verify(name: str, product: Any, m: int, config: Any) -> bool:
    """Prints TRY, then PASS or FAIL: a TRY that nothing follows ended its process, or did not end."""
    print("TRY", "-", name, flush=True)
    try:
        error: float = product.error(m, config)
    except Exception as problem:
        print("FAIL", "raised", name, "|", " ".join(str(problem).split())[:400], flush=True)
        if "CUDA error" in str(problem) or "illegal" in str(problem):
            raise
        return False
    print("PASS" if error < 3e-3 else "FAIL", f"{error:.2e}", name, flush=True)
    return error < 3e-3


def odd_sizes(family: str, index: int, count: int, deadline: float) -> None:
    """A family at sizes that fill no tile, in both types: this process's part, as far as half of its time reaches."""
    import torch

    from engine.kernels import dense_linear, int4_linear, int8_linear, linear_reference, reference
    from engine.kernels.device import facts
    from engine.kernels.int4_weights import Int4Weights

    kind, _, kernel = family.partition(":")
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(1)
    number, middle = 0, (time.monotonic() + deadline) / 2
    module = {"int4": int4_linear, "int8": int8_linear, "dense": dense_linear}[kind]
    for n, k, group in ((72, 160, 32), (200, 384, 128), (1000, 1152, 128), (4104, 2048, 128), (136, 512, 64)):
        for m in (1, 2, 5, 8, 13, 16, 33, 64, 100, 129, 256, 300, 513):
            configs = [c for c in module.candidates(m, n, k, facts(device)) if c["kernel"] == kernel]
            for dtype in (torch.float16, torch.bfloat16):
                for config in configs[:: max(1, len(configs) // 3)]:
                    number += 1
                    if number % count != index or time.monotonic() > middle:
                        continue
                    bias = None if m % 2 else torch.randn(n, device=device, generator=generator).to(dtype)
                    x = torch.randn(m, k, device=device, generator=generator).to(dtype)
                    name = f"{family} {n}x{k} g{group} M={m} {dtype} bias={bias is not None} {json.dumps(config)}"
                    try:
                        if kind == "int4":
                            low, high = -(2**31), 2**31
                            qweight, qzeros = (
                                torch.randint(low, high, (rows, n // 8), device=device, generator=generator).int()
                                for rows in (k, k // group)
                            )
                            scales = (torch.rand(k // group, n, device=device, generator=generator) * 0.1).half()
                            weights = Int4Weights.pack(qweight, qzeros, scales)
                            if not int4_linear.runs(config, m, dtype, weights, facts(device)):
                                continue
                            y = int4_linear.int4_linear(x, weights, bias, config)
                            exact = linear_reference.dense_linear(
                                x.float(), reference.unpack_int4(qweight, qzeros, scales), bias
                            )
                            if n % 16 == 0 and m in (33, 129) and dtype == torch.float16 and config is configs[0]:
                                y = int4_linear.int4_linear(x, weights, bias, config, gated=True)
                                gate, up = (part.flatten(1) for part in exact.view(m, -1, 2, 8).unbind(2))
                                exact = torch.nn.functional.silu(gate) * up
                        elif kind == "int8":
                            values, x_scales = reference.quantize_rows(x)
                            weight, w_scales = reference.quantize_rows(
                                torch.randn(n, k, device=device, generator=generator)
                            )
                            if not int8_linear.runs(config, m, n, k, facts(device)):
                                continue
                            y = int8_linear.int8_linear(values, x_scales, weight, w_scales, bias, dtype, config)
                            exact = reference.int8_linear(values, x_scales, weight, w_scales, bias, torch.float32)
                            plain = int8_linear.default_config(m, n, k, facts(device))
                            if not torch.equal(
                                y, int8_linear.int8_linear(values, x_scales, weight, w_scales, bias, dtype, plain)
                            ):
                                raise ValueError("other bits than the plain kernel's")
                        else:
                            weight = torch.randn(n, k, device=device, generator=generator).to(dtype)
                            y = dense_linear.dense_linear(x, weight, bias, config)
                            exact = linear_reference.dense_linear(x.float(), weight.float(), bias)
                        error = float((y.float() - exact).norm() / exact.norm())
                        good = error < (1e-3 if dtype == torch.float16 else 6e-3) and y.dtype == dtype
                        print("PASS" if good else "FAIL", f"{error:.2e}", name, flush=True)
                    except Exception as problem:
                        print("FAIL", "raised", name, " ".join(str(problem).split())[:400], flush=True)
                        if "CUDA error" in str(problem):
                            raise


def measure(families: str, index: int, count: int, seconds: float, given: argparse.Namespace) -> None:
    """Appends a JSON line a configuration to rows-<family>.jsonl, and to progress-<index>.txt a family as it begins."""
    started, left = time.monotonic(), families.split(",")
    progress = given.out / f"progress-{index}.txt"
    progress.write_text("")
    while left:
        family = left.pop(0)
        with progress.open("a") as file:
            file.write(family + "\n")
        shares = [WORK.get(each, (1, 2))[1] for each in (family, *left)]
        now = time.monotonic()
        measure_family(family, now + max(4.0, (started + seconds - now) * shares[0] / sum(shares)), given)


def measure_family(family: str, deadline: float, given: argparse.Namespace) -> None:
    from engine.kernels import tune

    lines = [line.split(None, 2) for line in (given.out / "checks.txt").read_text().splitlines()]
    known = {line[2].split(" | ")[0]: line[0] for line in lines if len(line) == 3 and line[0] in ("PASS", "FAIL")}
    tried = {line[2] for line in lines if line[0] == "TRY"}
    with (given.out / f"rows-{family.replace(':', '-')}.jsonl").open("w") as file:
        for product, m, configs in cases(family, given):
            if family == "cublas":
                if time.monotonic() > deadline:
                    return
                for rows in configs:
                    write(file, family, product, rows, library_time(product, rows), {"kernel": "cublas"})
                continue
            for config in configs:
                name = f"{family} {product.n}x{product.k} M={m} {json.dumps(config)}"
                if time.monotonic() > deadline:
                    print("out of time at", name)
                    return
                if known.get(name, "FAIL" if name in tried else "") == "FAIL":
                    continue
                if name not in known and not verify(name, product, m, config):
                    continue
                try:
                    write(file, family, product, m, tune.time_product(product, m, config), config)
                except Exception as problem:
                    print("FAIL", name, " ".join(str(problem).split())[:400], flush=True)
                    if "CUDA error" in str(problem) or "illegal" in str(problem):
                        raise


def library_time(product: Any, m: int) -> float:
    """Microseconds of cuBLAS: the median of three measurements, for it moves more than kernels of one's own."""
    import torch

    from engine.kernels import tune

    x, weights = product.inputs(m)[0], product.weights

    def call(i: int) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[i % len(weights)])

    return statistics.median(tune.microseconds(call, max(tune.LAUNCHES, len(weights))) for _ in range(3))


def write(file: Any, family: str, product: Any, m: int, us: float, config: Any) -> None:
    row = {"family": family, "op": product.op, "n": product.n, "k": product.k, "m": m, "us": round(us, 2)}
    row["tb_s"] = round(product.moved_bytes(m) / us / 1e6, 3)
    row["tflop_s"] = round(2 * m * product.n * product.k / us / 1e6, 1)
    file.write(json.dumps({**row, "config": config}) + "\n")
    file.flush()


def summarize(out: Path) -> None:
    """gemm.csv, best.csv, the device's table; prints the compact table: microseconds, and times cuBLAS float16."""
    import torch

    from engine.kernels import tune, tuning
    from engine.kernels.device import facts

    rows = [json.loads(line) for path in sorted(out.glob("rows-*.jsonl")) for line in path.read_text().splitlines()]
    with (out / "gemm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    best: dict[tuple[str, int, int, int], dict[str, Any]] = {}
    cublas = {}
    for row in rows:
        if row["family"] == "cublas":
            cublas[row["n"], row["k"], row["m"]] = row["us"]
        for key in ((row["op"], row["n"], row["k"], row["m"]), (row["family"], row["n"], row["k"], row["m"])):
            if row["us"] < best.get(key, {"us": float("inf")})["us"]:
                best[key] = row
    for (n, k, m), us in cublas.items():  # the library is a candidate of the dense product too
        key = ("dense_linear", n, k, m)
        if best[key]["family"] == "cublas":
            best[key] = {**best[key], "us": us, "config": {"kernel": "library"}}
    tuned = [
        {"op": op, "n": n, "k": k, "m": m, "us": row["us"], "config": row["config"]}
        for (op, n, k, m), row in best.items()
        if op in SPLIT_NAMES.values() and m in tuning.BUCKETS
    ]
    device = facts(torch.device("cuda")).name if torch.cuda.is_available() else "none"
    if tuned:
        print("table:", tuning.write(device, tuned, tune.versions(), out))
    with (out / "best.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(best[key] for key in sorted(best) if key[0] in FAMILIES + NOW)
    names = [name for name in FAMILIES + NOW if any(key[0] == name for key in best)]
    print(
        f"{device}: us, and times cuBLAS float16 in (); floor: bytes at 4.28 TB/s or products at 790 TFLOP/s, 2x int8"
    )
    print(f"{'N x K':>13} {'M':>5} {'floor4':>6} {'floor8':>6} {'fl16':>6}", *(f"{name:>14}" for name in names))
    for n, k, m in sorted({key[1:] for key in best}, key=lambda key: (key[1] * key[0], key)):
        flops = 2 * m * n * k
        moved = 2 * m * (n + k)
        floors = [
            max((n * k * size + moved) / BANDWIDTH, flops / rate) * 1e6
            for size, rate in ((0.5 + 4 / 128, FLOPS), (1, INT8_OPS), (2, FLOPS))
        ]
        shown = []
        for name in names:
            row = best.get((name, n, k, m))
            ratio = f"({cublas[n, k, m] / row['us']:.2f})" if row and (n, k, m) in cublas else ""
            shown.append(f"{row['us']:7.1f}{ratio:>7}" if row else " " * 14)
        print(f"{f'{n}x{k}':>13} {m:>5}", *(f"{floor:6.1f}" for floor in floors), *shown)


if __name__ == "__main__":
    main()
