"""`ingot bench collectives`: what tensor-parallel ranks say to each other in a decode step, by itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, check_out, provenance, record
from benchmarks.shapes import SHAPES, shape
from benchmarks.subject import find_device

ABOUT = """
`tp` ranks, GPUs or processes on the CPU, exchange what a step of `tokens` sequences has, a row each: the sum of hidden
states (two a layer), the logits to rank 0 and the drawn tokens from it (one each), and for w8a8 the rows that o and
down read, quantized by the maxima of all ranks (two a layer) and, beside it, by those of a rank alone: the difference
over a step is what equal int8 inputs cost. On GPUs each is a CUDA graph of many, as in the engine.
"""
SHOWN = ("model", "tp", "tokens", "sum_us", "maxima_us", "rows_us", "own_rows_us", "maxima_ms_a_step", "sums_ms_a_step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    shape: str = option("internlm7b", "the model", choices=tuple(SHAPES))
    tp: int = option(2, "ranks", least=2)
    tokens: tuple[int, ...] = option((1, 16, 64, 256), "sequences of a step; a row each", least=1)
    device: str = option("auto", "cpu or cuda; auto takes GPUs where there are any")
    dtype: str = option("auto", "computing type", choices=("auto", "float16", "bfloat16", "float32"))
    out: Path = option(RESULTS / "collectives.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench collectives", about=ABOUT)
    check_out(options.out)
    from engine.config import EngineConfig, Recipe
    from engine.runtime.capability import computing_dtype
    from engine.runtime.share import check_ranks
    from engine.storage.turbomind_files import check_fits

    device, model = find_device(options.device), shape(options.shape)
    config = EngineConfig(device=device, dtype=options.dtype, tp=options.tp)  # type: ignore[arg-type]  # its choices
    check_ranks(config)
    check_fits(model, Recipe(weights="w8a8"), options.tp)
    dtype = computing_dtype(model, config)
    found = measured({**asdict(options), "out": "", "device": device, "dtype": dtype}, options.tp)
    for tokens, seconds in zip(options.tokens, found, strict=True):
        sums, extra = 2 * seconds["sum"], seconds["o_rows"] + seconds["down_rows"]
        own = seconds["own_o_rows"] + seconds["own_down_rows"]
        row = {
            **provenance(device),
            "model": options.shape,
            "tp": options.tp,
            "dtype": dtype,
            "tokens": tokens,
            "sum_us": round(seconds["sum"] * 1e6, 2),
            "maxima_us": round(seconds["maxima"] * 1e6, 2),
            "rows_us": round(extra / 2 * 1e6, 2),
            "own_rows_us": round(own / 2 * 1e6, 2),
            "logits_us": round(seconds["logits"] * 1e6, 2),
            "drawn_us": round(seconds["drawn"] * 1e6, 2),
            "maxima_ms_a_step": round(model.num_layers * (extra - own) * 1e3, 4),
            "sums_ms_a_step": round(model.num_layers * sums * 1e3, 4),
        }
        record(options.out, row, SHOWN)
    return 0


def measured(task: dict[str, object], tp: int) -> list[dict[str, float]]:
    """Seconds of every exchange for each number of tokens, as rank 0 sees them."""
    import torch

    from benchmarks.collectives_rank import measure
    from engine.models import ranks
    from engine.runtime.rank_processes import RankProcesses
    from engine.runtime.share import rank_device

    others = RankProcesses(tp, task, module="benchmarks.collectives_rank")
    device = torch.device(rank_device(str(task["device"]), 0, tp))
    try:
        others.wait_for("loaded")
        with others.together():
            ranks.join(others.store, 0, tp, device)
            return measure(task, ranks.Ranks(0, tp), device)
    finally:
        others.close()
