"""Compiling grammars in a process with limits: `python -m engine.runtime.grammar_sandbox`, see grammar_compiler.py.

A schema of a few hundred characters can ask for a grammar of gigabytes, and a large vocabulary makes a harmless one
take a second. JSON lines come in, the tokenizer first and then grammars; a line goes out for each, with `text` or
`error`.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from pathlib import Path

from engine.config import Grammar
from engine.runtime.grammar import Grammars
from engine.runtime.grammar_compiler import MEMORY_BYTES, SECONDS
from engine.runtime.tokenizer import Tokenizer


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group; the parent decides when this ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    grammars: Grammars | None = None
    for line in sys.stdin.buffer:
        # The system ends the process at this limit, wherever it is, and whether or not the parent still lives.
        limit = math.ceil(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        asked = json.loads(line)
        try:
            if grammars is None:
                tokenizer = Tokenizer(Path(asked["folder"]))
                ends = tuple(asked["eos_token_ids"])
                # A parent keeps what it asked for: nothing is remembered here.
                grammars = Grammars(tokenizer, vocab_size=asked["vocab_size"], eos_token_ids=ends, most_bytes=0)
                answer = {"text": ""}
            else:
                answer = {"text": grammars.serialized(Grammar(**asked)).text}
        except Exception as error:  # whatever a grammar trips over is said to who wrote it
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
