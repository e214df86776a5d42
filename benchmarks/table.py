"""`ingot bench table`: every recipe over the cases that engines are compared by, one engine a recipe."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import generation, throughput, workload
from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, check_out, record
from benchmarks.subject import SubjectOptions, find_subject, tokens_per_step
from benchmarks.timeline import Run, run
from benchmarks.workload import Request

ABOUT = """
For each recipe, one engine over random weights of a shape, and through it: the cases of `ingot bench generation`
(batch x prompt tokens x answer tokens), then `requests` requests as in `ingot bench throughput`. Rows go to
generation.csv and throughput.csv in the folder `out`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(SubjectOptions):
    recipes: str = option("fp16,fp16-kv8,w4a16,w4a16-kv8,w8a8-kv8", "recipes, with commas")
    cases: str = option("1x16x512,64x1x2048,256x16x512,1x2048x2,16x2048x2", "batch x input x output, with commas")
    requests: int = option(1000, "of the throughput run; 0 leaves it out", least=0)
    at_once: int = option(256, "most sequences in a step", least=1)
    cache_max_entry_count: float = option(0.9, "KV cache: a share of free memory", least=0)
    cache_block_seq_len: int = option(64, "tokens in a page", least=1)
    out: Path = option(RESULTS, "the folder of the rows")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench table", about=ABOUT)
    check_out(options.out / "generation.csv")
    for recipe in options.recipes.split(","):
        weights, _, kv = recipe.partition("-")
        measure(dataclasses.replace(options, weights=weights, kv=kv or "kv16"))
    return 0


def measure(options: Options) -> None:
    """The rows of one recipe."""
    from benchmarks.ceilings import measure_ceilings
    from benchmarks.floor import cost

    subject = find_subject(options)
    ceilings = measure_ceilings(subject.device, subject.dtype)
    of = cost(subject.config, subject.recipe, subject.dtype, devices=subject.devices)
    cases = [tuple(int(part) for part in case.split("x")) for case in options.cases.split(",") if case]
    lengths = {"vocab_size": subject.config.vocab_size, "seed": subject.seed}
    requests = workload.log_normal(options.requests, **lengths) if options.requests else []
    longest = max([inputs + outputs for _, inputs, outputs in cases] + [workload.longest(requests) if requests else 2])
    begun = time.perf_counter()
    engine = subject.engine(
        session_len=longest,
        max_batch_size=options.at_once,
        num_tokens_per_iter=tokens_per_step(subject.device, 0),
        cache_max_entry_count=options.cache_max_entry_count,
        cache_block_seq_len=options.cache_block_seq_len,
    )
    load_seconds = time.perf_counter() - begun
    print(f"{subject.recipe}: {engine.memory}")
    for batch, inputs, outputs in cases:
        asked = workload.fixed(batch, inputs, outputs, **lengths)
        run(engine, [Request(each.prompt_ids, min(each.new_tokens, 8)) for each in asked])
        asked = workload.fixed(batch, inputs, outputs, vocab_size=subject.config.vocab_size, seed=subject.seed + 1)
        done = Run(timeline=run(engine, asked), engine="ingot", load_seconds=load_seconds)
        row = generation.row_of(subject, done, ceilings, of, batch=batch, inputs=inputs, outputs=outputs)
        record(options.out / "generation.csv", row, generation.SHOWN)
    if requests:
        run(engine, [Request(each.prompt_ids, min(each.new_tokens, 4)) for each in requests[: options.at_once]])
        done = Run(timeline=run(engine, requests), engine="ingot", load_seconds=load_seconds)
        row = throughput.row_of(subject, done, ceilings, requests, data=None, at_once=options.at_once)
        record(options.out / "throughput.csv", row, throughput.SHOWN)
    engine.close()
