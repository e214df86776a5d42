"""`ingot bench serving`: through HTTP, at request rates, against a running server or one that is started for it."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import workload
from benchmarks.cold import workspace_of
from benchmarks.http_client import Address, Answered, address_of, get, stream
from benchmarks.options import option, read_options
from benchmarks.others import Others
from benchmarks.rounds import Compared, are_enough, median_of
from benchmarks.rows import RESULTS, ROOT, check_out, provenance, record
from benchmarks.subject import Subject, SubjectOptions, find_subject, tokens_per_step
from benchmarks.timeline import percentile
from benchmarks.workload import Request

ABOUT = """
Sends requests to /v1/completions as a Poisson process of each rate, one row a rate: requests and tokens a second, and
the 50th, 95th and 99th percentile of the time to the first piece of text, of the gaps between pieces, and of the whole
request. Greedy, answers to their full length; lengths are log-normal (see `ingot bench throughput --help`) or fixed.
url= names a running server (its key in INGOT_API_KEY); else a server is started for artifact=, folder= or shape=, and
a last row compares `streams` requests at once through it with the same requests in an engine without a server:
`http_overhead` is the share of the tokens a second that HTTP costs. Both are run `rounds` times, one after the other,
each time in processes of their own, and the row is the round whose overhead is the median. A round in which other
processes took more than a twentieth of the processors is made again, once for each that was asked for; those that count
are the rounds in which others took least, at most `others_share`.
"""
SHOWN = (
    "model",
    "recipe",
    "case",
    "rate",
    "requests",
    "requests_per_second",
    "tokens_per_second",
    "first_p50_ms",
    "first_p99_ms",
    "gap_p50_ms",
    "gap_p99_ms",
    "total_p50_ms",
    "offline_tokens_per_second",
    "http_overhead",
)
SHARES = (0.5, 0.95, 0.99)
SECONDS_TO_ANSWER = 20
SECONDS_TO_STOP = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(SubjectOptions):
    url: str | None = option(None, "a running server: http://HOST:PORT")
    rates: tuple[float, ...] = option((1.0, 4.0, 0.0), "requests a second, a row each; 0 sends all at once", least=0)
    requests: int = option(100, "how many at each rate", least=1)
    input: int = option(0, "tokens of every prompt; 0 draws log-normal lengths", least=0)
    output: int = option(0, "tokens of every answer; 0 draws log-normal lengths", least=0)
    streams: int = option(64, "requests at once where HTTP is compared with the engine alone; 0 leaves it out", least=0)
    streams_input: int = option(16, "tokens of their prompts", least=1)
    streams_output: int = option(256, "tokens of their answers", least=1)
    rounds: int = option(3, "how often these two are compared", least=1)
    max_batch_size: int = option(0, "most sequences in a step of a server that is started; 0 is `streams`", least=0)
    out: Path = option(RESULTS / "serving.csv", "rows are added to this file; `none` keeps none")

    @property
    def batch(self) -> int:
        """The most sequences in a step."""
        return self.max_batch_size or max(self.streams, 1)


@dataclass(frozen=True, slots=True)
class Sent:
    """All answers to requests, and the processor time in seconds that sending and receiving took."""

    answers: list[Answered]
    seconds: float


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench serving", about=ABOUT)
    check_out(options.out)
    if options.url is not None:
        if options.artifact or options.folder or options.shape:
            raise ValueError("url= names a running server: leave artifact=, folder= and shape= out.")
        address = address_of(options.url, os.environ.get("INGOT_API_KEY"))
        model = get(address, "/v1/models")["data"][0]["id"]
        at_rates(options, address, {**provenance(), "engine": "server", "model": model}, vocab_size=None)
        return 0
    subject = find_subject(options)
    common = {**provenance(subject.device), "engine": "ingot", **subject.columns, "max_batch_size": options.batch}
    together = streams_of(options, subject)
    compared: list[Compared] = []
    with workspace_of(subject) as (folder, _):
        while True:
            with started(subject, folder, options.batch) as address:
                if not compared:
                    at_rates(options, address, common, vocab_size=subject.config.vocab_size)
                if not together:
                    return 0
                send(address, together, [0.0] * len(together))  # the first time is not counted
                watch = Others()
                through_http = send(address, together, [0.0] * len(together))
                others = watch.share()
            offline, beside = engine_alone(argv)
            compared.append(Compared(overhead(subject, together, through_http, offline), max(others, beside)))
            if are_enough(compared, options.rounds):
                break
    record(options.out, {**common, **median_of(compared, options.rounds)}, (*SHOWN, "overheads", "others_share"))
    return 0


def streams_of(options: Options, subject: Subject) -> list[Request]:
    """The requests that come at once, through HTTP and without it."""
    lengths = {"vocab_size": subject.config.vocab_size, "seed": subject.seed}
    return workload.fixed(options.streams, options.streams_input, options.streams_output, **lengths)


def engine_alone(argv: list[str]) -> tuple[float, float]:
    """Tokens a second of the engine without a server, in a process of its own, and the share that others took."""
    command = [sys.executable, "-m", "benchmarks.engine_alone", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise ValueError(f"the engine alone did not run: {(done.stderr.splitlines() or ['no word'])[-1]}")
    offline, others = done.stdout.split()[-2:]
    return float(offline), float(others)


def at_rates(options: Options, address: Address, common: dict[str, object], *, vocab_size: int | None) -> None:
    """A row for each rate. Without a known vocabulary prompts are of the ids that every model has."""
    for rate in options.rates:
        requests = asked(options, vocab_size or 256)
        sent = send(address, requests, workload.arrivals(len(requests), rate, seed=options.seed))
        row = {
            **common,
            "case": "rate",
            "rate": rate or "all at once",
            "requests": len(requests),
            "seed": options.seed,
            **figures(requests, sent),
        }
        record(options.out, row, SHOWN)


def asked(options: Options, vocab_size: int) -> list[Request]:
    """The requests of a rate: log-normal lengths, of which either may be fixed."""
    drawn = workload.log_normal(options.requests, vocab_size=vocab_size, seed=options.seed)
    prompts = workload.fixed(options.requests, options.input, 1, vocab_size=vocab_size, seed=options.seed)
    return [
        Request(fixed.prompt_ids if options.input else request.prompt_ids, options.output or request.new_tokens)
        for request, fixed in zip(drawn, prompts, strict=True)
    ]


def until_it_answers(address: Address) -> None:
    """Return when the server takes connections, a moment after it said where; ValueError if it never does."""
    until = time.perf_counter() + SECONDS_TO_ANSWER
    while True:
        try:
            get(address, "/v1/models")
            return
        except ValueError:
            if time.perf_counter() > until:
                raise
        time.sleep(0.05)


def send(address: Address, requests: Sequence[Request], times: Sequence[float]) -> Sent:
    """Each request sent at its time. ValueError where one is refused or comes short."""
    name = get(address, "/v1/models")["data"][0]["id"]
    posts = [
        (
            at,
            {
                "model": name,
                "prompt": request.prompt_ids,
                "max_tokens": request.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
        )
        for request, at in zip(requests, times, strict=True)
    ]
    begun = time.process_time()
    streams = stream(address, "/v1/completions", posts)
    seconds = time.process_time() - begun
    # Read when all have come: what reads one would delay the others.
    return Sent([whole(request, each.answered()) for request, each in zip(requests, streams, strict=True)], seconds)


def whole(request: Request, answer: Answered) -> Answered:
    """The answer; ValueError where it has come short."""
    if answer.tokens != request.new_tokens:
        raise ValueError(
            f"the server gave {answer.tokens} tokens where {request.new_tokens} were asked for, after a prompt of "
            f"{len(request.prompt_ids)}. If its session_len ends there, give lengths that fit: input=16 output=64."
        )
    return answer


def figures(requests: Sequence[Request], sent: Sent) -> dict[str, object]:
    """Columns of a row: rates of the whole run, percentiles in milliseconds, and the processor time of the client."""
    answers = sent.answers
    seconds = max(answer.ended for answer in answers) - min(answer.asked for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    gaps = [
        after - before for answer in answers for before, after in zip(answer.pieces, answer.pieces[1:], strict=False)
    ]
    measured = {
        "first": [answer.pieces[0] - answer.asked for answer in answers],
        "gap": gaps or [0.0],
        "total": [answer.ended - answer.asked for answer in answers],
    }
    found: dict[str, object] = {
        "mean_input": round(statistics.mean(len(request.prompt_ids) for request in requests), 1),
        "mean_output": round(tokens / len(answers), 1),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(answers) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_piece": round(tokens / sum(len(answer.pieces) for answer in answers), 3),
        "client_us_per_token": round(1e6 * sent.seconds / tokens, 1),
    }
    for name, values in measured.items():
        found |= {f"{name}_p{100 * share:.0f}_ms": round(1e3 * percentile(values, share), 2) for share in SHARES}
    return found


def overhead(subject: Subject, requests: Sequence[Request], sent: Sent, offline: float) -> dict[str, object]:
    """What HTTP costs against `offline` tokens a second of an engine without it."""
    found = figures(requests, sent)
    return {
        "case": "streams",
        "rate": "all at once",
        "requests": len(requests),
        "seed": subject.seed,
        **found,
        "offline_tokens_per_second": round(offline, 1),
        "http_overhead": round(1 - float(str(found["tokens_per_second"])) / offline, 4),
    }


def environment() -> dict[str, str]:
    """That of the processes which are measured: this checkout's code, and no key."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found.pop("INGOT_API_KEY", None)
    return found


@contextlib.contextmanager
def started(subject: Subject, folder: Path, batch: int) -> Iterator[Address]:
    """`ingot serve` on a free port, until the block ends; ValueError, in its words, where it does not start."""
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "serve",
        f"folder={folder}",
        "serve.port=0",
        "serve.prefix_caching=false",
    ]
    command += [f"serve.device={subject.device}", f"serve.max_batch_size={batch}"]
    command += [f"serve.tp={subject.tp}", f"serve.dtype={str(subject.dtype).removeprefix('torch.')}"]
    if budget := tokens_per_step(subject.device, 0):
        command.append(f"serve.num_tokens_per_iter={budget}")
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment())
        try:
            assert process.stdout is not None
            url = next((line.split()[1] for line in process.stdout if line.startswith("URL")), None)
            if url is None:
                process.wait()
                said.seek(0)
                last = said.read().strip().splitlines()[-1:] or ["it said nothing"]
                raise ValueError(f"the server did not start: {last[0].removeprefix('ingot: ')}")
            address = address_of(url)
            until_it_answers(address)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
