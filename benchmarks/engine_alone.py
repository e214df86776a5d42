"""The engine alone beside `ingot bench serving`: `python -m benchmarks.engine_alone KEY=VALUE ...`, its options.

A process of its own for each round, as the server's engine is. Prints tokens a second, and the share of the processors
that others took meanwhile.
"""

from __future__ import annotations

import gc
import sys

from benchmarks import workload
from benchmarks.options import read_options
from benchmarks.others import Others
from benchmarks.serving import ABOUT, Options, streams_of
from benchmarks.subject import find_subject, tokens_per_step
from benchmarks.timeline import run
from benchmarks.workload import Request


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="python -m benchmarks.engine_alone", about=ABOUT)
    subject = find_subject(options)
    requests = streams_of(options, subject)
    engine = subject.engine(
        session_len=workload.longest(requests),
        max_batch_size=options.batch,
        num_tokens_per_iter=tokens_per_step(subject.device, 0),
    )
    run(engine, [Request(request.prompt_ids, min(request.new_tokens, 16)) for request in requests])
    gc.collect()
    gc.freeze()  # as an engine process does
    others = Others()
    timeline = run(engine, requests)
    print(timeline.tokens_per_second, others.share())
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
