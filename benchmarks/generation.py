"""`ingot bench generation`: prompts and answers of fixed lengths at several batch sizes, greedy, to the full length."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import workload
from benchmarks.options import option, read_options
from benchmarks.peers import PeerOptions, check_peer, run_peer
from benchmarks.rows import RESULTS, check_out, provenance, record, say
from benchmarks.subject import Subject, find_subject, tokens_per_step
from benchmarks.timeline import Run, Timeline, milliseconds, run
from benchmarks.workload import Request

if TYPE_CHECKING:
    from benchmarks.ceilings import Ceilings
    from benchmarks.floor import Cost

ABOUT = """
Prompts and answers of fixed lengths, `batch` of them at once, one row a batch size. Answers are greedy and never end
before their length. A row has tokens a second (the whole run, prompts included), the median time to the first token,
the median decode step, the floor of the run (benchmarks/floor.py, with the copy speed measured in the same run) and the
share of it that was reached.
"""
WARM_UP_TOKENS = 16
SHOWN = (
    "engine",
    "model",
    "recipe",
    "batch",
    "input",
    "output",
    "tokens_per_second",
    "first_token_ms",
    "step_ms",
    "prefill_tflops",
    "floor_tokens_per_second",
    "share_of_floor",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PeerOptions):
    batch: tuple[int, ...] = option((1, 16, 64), "requests at once; a row each", least=1)
    input: int = option(1, "tokens of a prompt", least=1)
    output: int = option(2048, "tokens of an answer", least=1)
    repeats: int = option(1, "runs of each case; the median one is the row (a peer runs once)", least=1)
    num_tokens_per_iter: int = option(0, "token budget of a step; 0 is 8192 on a GPU, 512 on a CPU", least=0)
    cache_max_entry_count: float = option(0.0, "KV cache: a share of free memory, or pages; 0 is just enough", least=0)
    cache_block_seq_len: int = option(0, "tokens in a page; 0 is what the engine says", least=0)
    out: Path = option(RESULTS / "generation.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench generation", about=ABOUT)
    check_out(options.out)
    subject = replace(find_subject(options), deterministic=options.deterministic)
    if options.peer is not None:
        check_peer(options, subject)
    from benchmarks.ceilings import measure_ceilings
    from benchmarks.floor import cost

    ceilings = measure_ceilings(subject.device, subject.dtype)
    of = cost(subject.config, subject.recipe, subject.dtype, devices=subject.devices)
    lengths = {"vocab_size": subject.config.vocab_size, "seed": subject.seed}
    cases = [workload.fixed(batch, options.input, options.output, **lengths) for batch in options.batch]
    for batch, done in zip(options.batch, answered(options, subject, cases), strict=True):
        row = row_of(subject, done, ceilings, of, batch=batch, inputs=options.input, outputs=options.output)
        record(options.out, row, SHOWN)
    return 0


def row_of(
    subject: Subject, done: Run, ceilings: Ceilings, of: Cost, *, batch: int, inputs: int, outputs: int
) -> dict[str, object]:
    """The row of one case: what came out, and the floor of the run beside it."""
    from benchmarks.floor import cost, generation_seconds, prefill_operations

    timeline = done.timeline
    least = generation_seconds(of, ceilings, batch=batch, inputs=inputs, outputs=outputs)
    whole = cost(subject.config, subject.recipe, subject.dtype)
    products = prefill_operations(subject.config, whole, batch=batch, inputs=inputs)
    return {
        **provenance(subject.device),
        "engine": done.engine,
        **subject.columns,
        "batch": batch,
        "input": inputs,
        "output": outputs,
        "seconds": round(timeline.seconds, 4),
        "tokens_per_second": round(timeline.tokens_per_second, 2),
        "first_token_ms": milliseconds(timeline.time_to_first),
        "step_ms": milliseconds(timeline.step),
        **prefill_columns(timeline, products, batch * inputs),
        **ceilings.columns,
        "floor_tokens_per_second": round(batch * outputs / least, 1),
        "share_of_floor": round(least / timeline.seconds, 4),
        "load_seconds": round(done.load_seconds, 2),
    }


def prefill_columns(timeline: Timeline, operations: int, tokens: int) -> dict[str, object]:
    """Speed of computing the prompts, until the last request has its first token; empty where no engine told."""
    if not timeline.first:
        return {"prefill_tokens_per_second": "", "prefill_tflops": ""}
    seconds = max(timeline.first)
    return {
        "prefill_tokens_per_second": round(tokens / seconds, 1),
        "prefill_tflops": round(operations / seconds / 1e12, 3),
    }


def answered(options: Options, subject: Subject, cases: Sequence[Sequence[Request]]) -> Iterator[Run]:
    """What the engine, or the peer, made of each case, one after the other."""
    largest = max(options.batch)
    if options.peer is not None:
        yield from run_peer(options, subject, cases, at_once=largest)
        return
    say(f"loading {subject.columns['model']}")
    begun = time.perf_counter()
    engine = subject.engine(
        session_len=max(options.input + options.output, 2),
        max_batch_size=largest,
        num_tokens_per_iter=tokens_per_step(subject.device, options.num_tokens_per_iter),
        cache_max_entry_count=options.cache_max_entry_count
        or enough_pages(largest, options.input + options.output, options.cache_block_seq_len),
        cache_block_seq_len=options.cache_block_seq_len,
    )
    load_seconds = time.perf_counter() - begun
    for case in cases:
        say(f"batch {len(case)}: {options.input} tokens in, {options.output} out, runs: {options.repeats}")
        run(engine, [Request(each.prompt_ids, min(each.new_tokens, WARM_UP_TOKENS)) for each in case])
        timelines = sorted((run(engine, case) for _ in range(options.repeats)), key=lambda each: each.seconds)
        yield Run(timeline=timelines[len(timelines) // 2], engine=subject.engine_name, load_seconds=load_seconds)
    engine.close()


def enough_pages(sequences: int, tokens: int, page_len: int) -> int:
    """Pages for so many sequences of so many tokens, with one page each to spare."""
    from engine.config import DEFAULTS

    return sequences * (-(-tokens // (page_len or DEFAULTS.cache_block_seq_len)) + 1)
