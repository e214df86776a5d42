"""`ingot bench profile`: how much of a decode step the host takes, and where."""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import workload
from benchmarks.generation import enough_pages
from benchmarks.options import option, read_options
from benchmarks.rows import RESULTS, ROOT, check_out, provenance, record
from benchmarks.stopwatch import Stopwatch
from benchmarks.subject import SubjectOptions, find_subject, tokens_per_step
from benchmarks.workload import Request

if TYPE_CHECKING:
    from engine.runtime.engine import Engine

ABOUT = """
Decode steps of `batch` sequences around `context` tokens, when the same requests have been answered once, so that an
engine is seen that has run for a while (each token's text is found when it first comes). `host_ms` is the time of a
step in which the thread that steps the engine does not wait for the device (a GPU), or is not inside the model (a CPU):
scheduling, staging, launching, sampling, text; `host_share` its share of the step. Both are medians; where a few steps
are slow `host_mean_ms` and `host_most_ms` are far above. In steps of their own, since looking takes time:
`host_processor_ms` is what the thread computed in the mean (the rest it was kept from it), and `launch_ms` how long it
was, in the mean, in calls that start the device's work, copies and a graph. Printed below the row is where such a
thread spends its time, by Python's profiler, which slows Python down, so these are shares, not times.
"""
MEASURED = ("steps", "step_ms", "host_ms", "host_share", "host_mean_ms", "host_most_ms", "host_processor_ms")
SHOWN = ("model", "recipe", "batch", "context", *MEASURED, "launch_ms")
PLACES = 12


class Step(NamedTuple):
    """A step in seconds: all of it, and the host's part."""

    whole: float
    host: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(SubjectOptions):
    batch: int = option(64, "sequences at once", least=1)
    context: int = option(1024, "tokens of a sequence in the middle of the measurement", least=2)
    steps: int = option(200, "decode steps", least=10)
    num_tokens_per_iter: int = option(0, "token budget of a step; 0 is 8192 on a GPU, 512 on a CPU", least=0)
    out: Path = option(RESULTS / "profile.csv", "rows are added to this file; `none` keeps none")


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench profile", about=ABOUT)
    check_out(options.out)
    subject = find_subject(options)
    inputs = max(options.context - options.steps // 2, 1)
    length = inputs + options.steps + 1
    engine = subject.engine(
        session_len=length,
        max_batch_size=options.batch,
        num_tokens_per_iter=tokens_per_step(subject.device, options.num_tokens_per_iter),
        cache_max_entry_count=enough_pages(options.batch, length, 0),
    )
    requests = workload.fixed(
        options.batch, inputs, options.steps + 1, vocab_size=subject.config.vocab_size, seed=subject.seed
    )
    not_host = not_the_host(subject.device)
    again(engine, requests, Stopwatch([]))
    with Stopwatch(not_host) as elsewhere:
        steps = again(engine, requests, elsewhere)
    if not elsewhere.calls:
        raise ValueError(
            "the engine waited for the device in a way that this benchmark does not know: nothing to tell."
        )
    with Stopwatch(not_host, clock=time.thread_time) as elsewhere, Stopwatch(launching()) as launches:
        computed = again(engine, requests, elsewhere, clock=time.thread_time)
    begin(engine, requests)
    profiler = cProfile.Profile()
    profiler.runcall(decode, engine, len(requests), Stopwatch([]))
    engine.close()
    host = [step.host for step in steps]
    typical, whole = statistics.median(host), statistics.median(step.whole for step in steps)
    found = places(pstats.Stats(profiler))[:PLACES]
    row = {
        **provenance(subject.device),
        "engine": "ingot",
        **subject.columns,
        "batch": options.batch,
        "context": options.context,
        "steps": len(steps),
        "step_ms": round(whole * 1e3, 4),
        "host_ms": round(typical * 1e3, 4),
        "host_share": round(typical / whole, 4),
        "host_mean_ms": round(statistics.mean(host) * 1e3, 4),
        "host_most_ms": round(max(host) * 1e3, 4),
        "host_processor_ms": round(statistics.mean(step.host for step in computed) * 1e3, 4),
        "launch_ms": round(launches.seconds / len(computed) * 1e3, 4),
        "places": "; ".join(f"{place} {100 * share:.1f}%" for place, share in found),
    }
    record(options.out, row, SHOWN)
    for place, share in found:
        print(f"  {100 * share:5.1f}%  {place}")
    return 0


def not_the_host(device: str) -> list[tuple[type, str]]:
    """The methods in which a step waits for a GPU, or computes the model on a CPU."""
    import torch

    from engine.models.decoder import Decoder

    if device.startswith("cuda"):
        return [(torch.cuda.Event, "synchronize")]
    return [(Decoder, "__call__"), (Decoder, "logits")]


def launching() -> list[tuple[type, str]]:
    """The methods that start copies and graphs, and do not wait for them."""
    import torch

    from engine.runtime.runner import Runner
    from engine.runtime.staging import Staging

    return [(Staging, "send"), (torch.cuda.CUDAGraph, "replay"), (Runner, "_read")]


def begin(engine: Engine, requests: Sequence[Request]) -> None:
    """Compute all requests up to their first tokens; what was there before is ended."""
    from engine.config import Sampling

    begun: set[str] = set()
    while engine.has_work():
        engine.step()
    for request in requests:
        sampling = Sampling(max_new_tokens=request.new_tokens, temperature=0.0, ignore_eos=True)
        engine.add(list(request.prompt_ids), sampling)
    while len(begun) < len(requests):
        begun |= {event.request_id for event in engine.step() if event.token_ids}


def again(
    engine: Engine, requests: Sequence[Request], elsewhere: Stopwatch, clock: Callable[[], float] = time.perf_counter
) -> list[Step]:
    """`begin` and `decode`."""
    begin(engine, requests)
    return decode(engine, len(requests), elsewhere, clock)


def decode(
    engine: Engine, batch: int, elsewhere: Stopwatch, clock: Callable[[], float] = time.perf_counter
) -> list[Step]:
    """The steps in which all sequences get a token; those that began early end early. `elsewhere` goes by `clock`."""
    steps: list[Step] = []
    while engine.has_work():
        before, apart = clock(), elsewhere.seconds
        events = engine.step()
        whole = clock() - before
        if len(events) == batch:
            steps.append(Step(whole, whole - (elsewhere.seconds - apart)))
        elif steps:
            break
    if not steps:
        raise ValueError(
            f"the first of {batch} sequences had ended before the last began: raise num_tokens_per_iter or steps."
        )
    return steps


def places(stats: Any) -> list[tuple[str, float]]:
    """Functions with their own share of the time, the largest first; files of this project from its root."""
    total = sum(entry[2] for entry in stats.stats.values())
    found = []
    for (file, line, name), (_, _, own, _, _) in stats.stats.items():
        path = Path(file)
        inside = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        where = f"{path.relative_to(ROOT)}:{line} " if inside else "" if file == "~" else f"{path.name}:{line} "
        found.append((f"{where}{name}", own / total))
    return sorted(found, key=lambda each: -each[1])
