"""Flags of LMDeploy's commands that serve and chat: those that mean something here, and why the others do not."""

from __future__ import annotations

import argparse
import ast
from typing import Any

LEVELS = {"CRITICAL": "none", "ERROR": "none", "WARNING": "none", "INFO": "text", "DEBUG": "text"}
"""Its log levels as serve.access_log: errors are always said."""
NOT_HERE = {
    "accel": "this engine has kernels of its own, and DeepSpeed is no part of it",
    "adapter": "how a conversation is written is the checkpoint's chat template, not an adapter",
    "allow-credentials": "a page sends its key in the Authorization header, and cookies mean nothing to this server",
    "allow-headers": "pages of --allow-origins may send any header",
    "allow-methods": "pages of --allow-origins may use any method",
    "debug": "there is no log file to write more into",
    "log-file": "no prompt and no answer is written to a file: `script` or `tee` records a terminal",
    "max-alloc": "the memory of the KV cache is --cache-max-entry-count of api_server",
}
"""Flags and why they are refused. The values in ASKS_FOR_NOTHING are accepted: they ask for what is done anyway."""
ASKS_FOR_NOTHING = {
    "accel": {"None"},
    "allow-credentials": {"False"},
    "allow-headers": {"*", "['*']", '["*"]'},
    "allow-methods": {"*", "['*']", '["*"]'},
    "debug": {"False"},
}


class _Refuse(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        name = self.option_strings[0].removeprefix("--")
        if values not in ASKS_FOR_NOTHING.get(name, ()):
            given = "" if values is None else f" {values}"
            raise ValueError(f"--{name}{given} cannot be honoured: {NOT_HERE[name]}. Leave it out.")


def refuse(parser: argparse.ArgumentParser, *names: str) -> None:
    """Flags of NOT_HERE: a value that asks for something is a ValueError with the reason."""
    for name in names:
        alone = "?" if name == "debug" else None
        parser.add_argument(f"--{name}", action=_Refuse, nargs=alone, metavar="X", help=f"not here: {NOT_HERE[name]}")


def origins(text: str) -> list[str]:
    """serve.cors_origins from `*`, `https://a.org,https://b.org`, or a list as Python writes it."""
    if text.startswith("["):
        try:
            listed = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise argparse.ArgumentTypeError(f"{text} is no list of origins") from error
        if not all(isinstance(each, str) for each in listed):
            raise argparse.ArgumentTypeError(f"{text} is no list of origins")
        return list(listed)
    return text.split(",")


def log_level(text: str) -> str:
    """serve.access_log from a log level."""
    if text.upper() not in LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(LEVELS)}")
    return LEVELS[text.upper()]
