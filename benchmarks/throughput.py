"""`ingot bench throughput`: many requests of different lengths at once, from a file of conversations or from a seed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import workload
from benchmarks.options import option, read_options
from benchmarks.peers import PeerOptions, check_peer, run_peer
from benchmarks.rows import RESULTS, check_out, provenance, record, say
from benchmarks.subject import Subject, find_subject, tokens_per_step
from benchmarks.timeline import Run, milliseconds, run
from benchmarks.workload import Request

if TYPE_CHECKING:
    from benchmarks.ceilings import Ceilings

ABOUT = f"""
`requests` requests, all there from the start, at most `at_once` of them in a step; greedy, answers to their full
length. Lengths come from data=FILE in ShareGPT's format, or are log-normal: in with median {workload.INPUT_MEDIAN} and
deviation {workload.INPUT_DEVIATION} of the logarithm, out with {workload.OUTPUT_MEDIAN} and \
{workload.OUTPUT_DEVIATION}, cut to {workload.SHORTEST}..{workload.LONGEST}: means of 240 and 229.
"""
SHOWN = (
    "engine",
    "model",
    "recipe",
    "requests",
    "at_once",
    "requests_per_second",
    "tokens_per_second",
    "first_token_ms",
    "floor_requests_per_second",
    "share_of_floor",
)
DEFAULT_SHARE = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PeerOptions):
    requests: int = option(1000, "how many", least=1)
    at_once: int = option(256, "most requests in a step", least=1)
    data: Path | None = option(None, "a JSON file in ShareGPT's format, in place of log-normal lengths")
    num_tokens_per_iter: int = option(0, "token budget of a step; 0 is 8192 on a GPU, 512 on a CPU", least=0)
    cache_max_entry_count: float = option(
        0.0, f"KV cache: a share of free memory, or pages; 0 is {DEFAULT_SHARE}", least=0
    )
    cache_block_seq_len: int = option(0, "tokens in a page; 0 is what the engine says", least=0)
    out: Path = option(RESULTS / "throughput.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench throughput", about=ABOUT)
    check_out(options.out)
    subject = replace(find_subject(options), deterministic=options.deterministic)
    if options.peer is not None:
        check_peer(options, subject)
    from benchmarks.ceilings import measure_ceilings

    requests = asked(subject, options.data, options.requests)
    ceilings = measure_ceilings(subject.device, subject.dtype)
    done = answered(options, subject, requests)
    row = row_of(subject, done, ceilings, requests, data=options.data, at_once=options.at_once)
    record(options.out, row, SHOWN)
    return 0


def row_of(
    subject: Subject, done: Run, ceilings: Ceilings, requests: list[Request], *, data: Path | None, at_once: int
) -> dict[str, object]:
    """The row of one run: what came out, and the floor of the run beside it."""
    from benchmarks.floor import cost, throughput_seconds

    timeline = done.timeline
    lengths = [(len(request.prompt_ids), request.new_tokens) for request in requests]
    floor = cost(subject.config, subject.recipe, subject.dtype, devices=subject.devices)
    least = throughput_seconds(floor, ceilings, lengths, at_once=min(at_once, len(requests)))
    return {
        **provenance(subject.device),
        "engine": done.engine,
        **subject.columns,
        "data": "log_normal" if data is None else data.name,
        "seed": subject.seed,
        "requests": len(requests),
        "at_once": at_once,
        "mean_input": round(sum(inputs for inputs, _ in lengths) / len(lengths), 1),
        "mean_output": round(sum(outputs for _, outputs in lengths) / len(lengths), 1),
        "seconds": round(timeline.seconds, 3),
        "requests_per_second": round(len(requests) / timeline.seconds, 3),
        "tokens_per_second": round(timeline.tokens_per_second, 1),
        "first_token_ms": milliseconds(timeline.time_to_first),
        **ceilings.columns,
        "floor_requests_per_second": round(len(requests) / least, 2),
        "share_of_floor": round(least / timeline.seconds, 4),
    }


def answered(options: Options, subject: Subject, requests: list[Request]) -> Run:
    """What the engine, or the peer, made of the requests."""
    if options.peer is not None:
        [done] = run_peer(options, subject, [requests], at_once=options.at_once, time_first=False)
        return done
    say(f"loading {subject.columns['model']}")
    begun = time.perf_counter()
    engine = subject.engine(
        session_len=workload.longest(requests),
        max_batch_size=options.at_once,
        num_tokens_per_iter=tokens_per_step(subject.device, options.num_tokens_per_iter),
        cache_max_entry_count=options.cache_max_entry_count or DEFAULT_SHARE,
        cache_block_seq_len=options.cache_block_seq_len,
    )
    load_seconds = time.perf_counter() - begun
    run(engine, [Request(request.prompt_ids, min(request.new_tokens, 4)) for request in requests[: options.at_once]])
    say(f"{len(requests)} requests, at most {options.at_once} at once")
    timeline = run(engine, requests)
    engine.close()
    return Run(timeline=timeline, engine=subject.engine_name, load_seconds=load_seconds)


def asked(subject: Subject, data: Path | None, count: int) -> list[Request]:
    """The requests of a benchmark: of a file of conversations, or log-normal."""
    if data is None:
        return workload.log_normal(count, vocab_size=subject.config.vocab_size, seed=subject.seed)
    if not data.is_file():
        raise ValueError(f"data={data} is not a file.")
    return workload.share_gpt(data, subject.tokenizer().encode, count, seed=subject.seed)
