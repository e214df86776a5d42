"""`ingot bench memory`: memory against batch size, with the KV cache as computed and as int8."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import workload
from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, check_out, provenance, record
from benchmarks.subject import DoesNotFit, ModelOptions, Subject, find_subject, tokens_per_step, with_kv

if TYPE_CHECKING:
    import torch

ABOUT = """
The memory that a model needs for `batch` sequences of `context` tokens at once, one row a batch size and kind of KV
cache. On a GPU it is measured: the sequences are computed, and `total_mb` is what the device then misses, CUDA's own
context among it. On a CPU the report is computed, exact to the byte for weights and pages, in the model's own type;
what a GPU takes beside them is not in it. plot=FILE draws the rows of this run.
"""
SHOWN = ("model", "recipe", "batch", "context", "source", "weights_mb", "kv_mb", "other_mb", "total_mb", "fits")
MB = 1e6
NEW_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(ModelOptions):
    batch: tuple[int, ...] = option((1, 8, 16, 24, 32, 48), "sequences at once; a row each", least=1)
    context: int = option(2048, "tokens of a sequence, prompt and answer", least=NEW_TOKENS + 1)
    caches: tuple[str, ...] = option(("kv16", "kv8"), "kinds of KV cache", choices=("kv16", "kv8"))
    plot: Path | None = option(None, "draw the rows of this run into this file (.svg, .png, .pdf)")
    out: Path = option(RESULTS / "memory.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench memory", about=ABOUT)
    check_out(options.out)
    if options.plot is not None:
        from benchmarks.plots import check_plot

        check_plot(options.plot)
    subject = find_subject(options)
    measured = subject.device.startswith("cuda")
    rows: list[Mapping[str, object]] = []
    for kv in options.caches:
        for batch in options.batch:
            # A folder has the scales that it has.
            granularity = options.granularity if subject.folder is None else subject.recipe.kv_granularity
            of_kv = with_kv(subject, kv, granularity)
            found = (measure if measured else compute)(of_kv, batch, options.context)
            row = {
                **provenance(subject.device),
                "engine": "ingot",
                **of_kv.columns,
                "dtype": str(own_dtype(subject)).removeprefix("torch."),
                "batch": batch,
                "context": options.context,
                "source": "measured" if measured else "computed",
                **found,
            }
            record(options.out, row, SHOWN)
            rows.append(row)
    if options.plot is not None:
        from benchmarks.plots import draw

        draw("memory", [{name: str(value) for name, value in row.items()} for row in rows], options.plot)
    return 0


def own_dtype(subject: Subject) -> torch.dtype:
    """The type of the figures: that of the run on a GPU, the model's own where they are only computed."""
    import torch

    return subject.dtype if subject.device.startswith("cuda") else getattr(torch, subject.config.dtype)


def compute(subject: Subject, batch: int, context: int) -> dict[str, object]:
    """Weights and pages by their shapes, for pages that hold all sequences whole."""
    from benchmarks.random_weights import weight_bytes

    weights = weight_bytes(subject.config, subject.recipe, own_dtype(subject))
    return report(weights, page_bytes_of(subject, batch, context), None, fits="")


def measure(subject: Subject, batch: int, context: int) -> dict[str, object]:
    """The same on a GPU, after the sequences were computed to their last token. The total is the device's: another
    process on it would be counted too."""
    import torch

    from benchmarks.timeline import run

    device = torch.device(subject.device)
    allocated = torch.cuda.memory_allocated(device)
    try:
        engine = subject.engine(
            session_len=context,
            max_batch_size=batch,
            num_tokens_per_iter=tokens_per_step(subject.device, 0),
            cache_max_entry_count=batch * pages_of(context),
            quant_policy=4 if subject.recipe.kv == "kv8" else 0,
        )
        # What the engine itself says of weights and pages, where it does.
        said = getattr(engine, "memory", None)
        pages = page_bytes_of(subject, batch, context) if said is None else said.pages
        weights = torch.cuda.memory_allocated(device) - allocated - pages if said is None else said.weights
        torch.cuda.empty_cache()  # what loading left behind is none of the model's
        lengths = {"vocab_size": subject.config.vocab_size, "seed": subject.seed}
        run(engine, workload.fixed(batch, context - NEW_TOKENS, NEW_TOKENS, **lengths))
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        found = report(weights, pages, total - free, fits="yes")
        del engine
    except (DoesNotFit, torch.cuda.OutOfMemoryError):
        found = {"fits": "no"}
    gc.collect()
    torch.cuda.empty_cache()
    return found


def page_bytes_of(subject: Subject, batch: int, context: int) -> int:
    """The pages that hold `batch` sequences whole."""
    from engine.config import DEFAULTS
    from engine.models.cache import page_bytes

    page_len = DEFAULTS.cache_block_seq_len
    page = page_bytes(
        subject.config,
        page_len=page_len,
        dtype=own_dtype(subject),
        quantized=subject.recipe.kv == "kv8",
        per_token=subject.recipe.kv_granularity == "token",
    )
    return batch * pages_of(context) * page


def pages_of(tokens: int) -> int:
    from engine.config import DEFAULTS

    return -(-tokens // DEFAULTS.cache_block_seq_len)


def report(weights: int, pages: int, total: int | None, *, fits: str) -> dict[str, object]:
    """Columns of a row; without a total that of weights and pages."""
    other = 0 if total is None else total - weights - pages
    return {
        "weights_mb": round(weights / MB, 1),
        "kv_mb": round(pages / MB, 1),
        "other_mb": round(other / MB, 1),
        "total_mb": round((weights + pages + other) / MB, 1),
        "fits": fits,
    }
