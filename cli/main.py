"""The `ingot` command: a table of verbs, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys

VERBS = {
    "build": ("pipelines.build", "build artifacts: overrides, sweeps with -m; prints their ids"),
    "gate": ("pipelines.gate", "show which gates were missed; exit 1 if any"),
    "ladder": ("pipelines.ladder", "climb the recipes in order and choose the cheapest that passes"),
    "report": ("pipelines.report", "errors and outliers of every layer, as a page of figures"),
    "verify": ("pipelines.verify", "check that everything in dvc.lock is whole in the cache"),
    "artifacts": ("cli.artifacts", "list, show, verify, pin, export, push and pull what was built"),
    "serve": ("cli.serve", "serve an artifact over HTTP, with OpenAI's API"),
    "health": ("cli.health", "whether a server is ready: an exit code, for probes"),
    "chat": ("cli.chat", "talk to a server or an artifact in the terminal"),
    "web": ("cli.web", "a page in the browser to chat with a server"),
    "generate": ("cli.generate", "complete one prompt with an artifact"),
    "bench": ("benchmarks.bench", "measure speed and memory; rows and plots"),
    "convert": ("cli.seed:convert", "a checkpoint as a plain TurboMind workspace, unmeasured"),
    "lite": ("cli.seed:lite", "calibrate, auto_awq, smooth_quant, kv_qparams: LMDeploy's, on plain folders"),
}
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code. A user's mistake is one paragraph and 1; `--debug` shows its traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = arguments[:1] == ["--debug"]
    if debug:
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"Did you mean `ingot {near[0]}`? " if near else ""
        return fail(f"there is no verb {verb!r}. {meant}`ingot --help` lists the verbs.")
    try:
        module, _, function = VERBS[verb][0].partition(":")
        return int(getattr(importlib.import_module(module), function or "main")(arguments[1:]) or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if debug:
            raise
        return fail(str(error))


def overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        ["usage: ingot [--debug] VERB ...", "", *lines, "", "`ingot VERB --help` says more. --debug shows tracebacks."]
    )


def fail(text: str) -> int:
    print(f"ingot: {' '.join(text.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
