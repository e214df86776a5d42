"""Keys, from the files that options name and from the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from server.config import ServeConfig
from server.keys import read_key_lines


def key_file(name: str, option: str) -> str:
    """The text of the file that `option` names. ValueError where it cannot be read."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(
            f"{option}={name} cannot be read: {reason}. Name a file with the key, or with a line 'NAME: KEY' for each "
            "caller."
        ) from error


def read_keys(config: ServeConfig) -> dict[str, str]:
    """The keys of serve.api_key_file, else serve.api_key (with a warning), else INGOT_API_KEY; empty without any."""
    if config.api_key_file is not None:
        text = key_file(config.api_key_file, "serve.api_key_file")
        return read_key_lines(text, source=f"serve.api_key_file={config.api_key_file}")
    if config.api_key is not None:
        print("ingot: serve.api_key= can be seen in the process list; prefer serve.api_key_file=FILE", file=sys.stderr)
        return read_key_lines(config.api_key, source="serve.api_key")
    if "INGOT_API_KEY" in os.environ:
        return read_key_lines(os.environ["INGOT_API_KEY"], source="INGOT_API_KEY")
    return {}


def first_key(file: str | None) -> str:
    """A client's key: the first one of `file`, as `ingot serve` reads it, else of INGOT_API_KEY; empty without any."""
    if file is not None:
        keys = read_key_lines(key_file(file, "--api-key-file"), source=f"--api-key-file={file}")
    else:
        text = os.environ.get("INGOT_API_KEY", "")
        keys = read_key_lines(text, source="INGOT_API_KEY") if text else {}
    return next(iter(keys.values()), "")
