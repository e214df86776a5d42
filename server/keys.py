"""Keys of callers, each with a name: whose requests wait in line, whose sessions they are, and what logs say."""

from __future__ import annotations

import re
from collections.abc import Mapping

Keys = Mapping[str, str]
"""Keys by name."""
UNNAMED = "default"
MOST_KEYS = 10_000
LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):\s+)?(?P<key>[!-~]+)")


def read_key_lines(text: str, *, source: str) -> dict[str, str]:
    """The keys of a file: one key alone, or a line `NAME: KEY` for each caller; `#` begins a comment line.

    ValueError, naming `source` and never a key, for anything else.
    """
    keys: dict[str, str] = {}
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(
                f"{source} does not hold a key in line {number}: a key is one word of printable ASCII characters, "
                "alone or as 'NAME: KEY', a line for each caller."
            )
        name, key = found["name"] or UNNAMED, found["key"]
        if name in keys:
            raise ValueError(f"{source} has the name {name!r} twice: give every key a name of its own, as 'NAME: KEY'.")
        if key in keys.values():
            raise ValueError(f"{source} has the key of {name!r} twice: one key cannot be two callers.")
        keys[name] = key
    if not keys:
        raise ValueError(f"{source} does not hold a key: it must be one word of printable ASCII characters.")
    if len(keys) > MOST_KEYS:
        raise ValueError(f"{source} holds {len(keys)} keys, but at most {MOST_KEYS} are compared with each request.")
    return keys
