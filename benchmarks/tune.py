"""`ingot bench tune`: the fastest configuration of every matrix product and of attention on this GPU, in a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import option, read_options
from benchmarks.shapes import SHAPES, shape

if TYPE_CHECKING:
    from engine.config import ModelConfig

ABOUT = """
Times the configurations of the matrix products (int4, int8 and dense) at the sizes of a model's shape, and of decode
attention over each kind of cache (`decode_attention`), and writes the fastest into the table of this device, which the
engine reads when it serves; nothing is tuned while serving. A device without a table runs on defaults. What is not
reached in the time keeps the row that it had. Prints a line a product.
"""
ATTENTION = "decode_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    shape: str = option("internlm7b", "the model whose sizes are tuned", choices=tuple(SHAPES))
    tp: int = option(1, "tensor-parallel ranks whose share of it is tuned", least=1)
    tokens: tuple[int, ...] = option((), "rows of a step; every size that a table has, where left out", least=1)
    operations: tuple[str, ...] = option(("all",), "which ones: the names that a table has")
    seconds: float = option(600.0, "for everything", least=1)
    device: str = option("auto", "cuda or cuda:N")
    out: Path | None = option(None, "the folder of the table; the engine's own, where left out")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench tune", about=ABOUT)
    import torch

    from benchmarks.subject import find_device

    device = find_device(options.device)
    if not device.startswith("cuda"):
        raise ValueError("kernels are tuned on a GPU, and this machine has none; on a CPU there is nothing to tune.")
    from engine.kernels import tune, tuning

    known = (*tune.MODULES, *tune.FUSED, ATTENTION)
    operations = known if options.operations == ("all",) else options.operations
    if unknown := [op for op in operations if op not in known]:
        raise ValueError(f"operations={unknown[0]} is not known; there are {', '.join(known)}.")
    folder, begun = options.out or tuning.TABLES, time.monotonic()

    def report(line: str) -> None:
        print(line, flush=True)

    if ATTENTION in operations:
        from benchmarks.tune_attention import tune_attention
        from engine.kernels.device import facts

        rows = tune_attention(share_of(options.shape, options.tp), device, seconds=options.seconds, report=report)
        tuning.write(facts(torch.device(device)).name, rows, tune.versions(), folder)
    path = tune.tune(
        device,
        seconds=options.seconds - (time.monotonic() - begun),
        shapes=products(options.shape, options.tp),
        rows=options.tokens or tune.ROWS,
        operations=operations,
        folder=folder,
        report=report,
    )
    print(path)
    return 0


def share_of(name: str, tp: int) -> ModelConfig:
    """What one of `tp` ranks has of a shape. ValueError where it cannot be cut so."""
    from engine.config import Recipe
    from engine.storage.rank_cuts import rank_config
    from engine.storage.turbomind_files import check_fits

    check_fits(shape(name), Recipe(), tp)
    return rank_config(shape(name), Recipe(), tp)


def products(name: str, tp: int = 1) -> list[tuple[int, int]]:
    """(outputs, inputs) of the products that a rank has of a shape: those of a layer and that of the output matrix."""
    from benchmarks.linear_cases import layer_products

    config = share_of(name, tp)
    return [*layer_products(config), (-(-config.vocab_size // tp), config.hidden_size)]
