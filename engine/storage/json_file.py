"""JSON that others wrote: config.json and its neighbours, and the headers of safetensors files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.wording import cut

# Real files are nested 8 deep. What walks a value (repr, copying, writing it again) gives up at several hundred.
DEEPEST = 64
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; FileNotFoundError without the file, ValueError naming it for anything but an object."""
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}: fetch it again") from error


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object that UTF-8 bytes say. ValueError, worded to follow a name, for what is none, for values nested more
    than DEEPEST deep, and for text that is not Unicode (half of a surrogate pair)."""
    try:
        text = raw.decode("utf-8-sig")
        content = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({cut(str(error))})") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a JSON {type(content).__name__}, not an object")
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
    if level:
        raise _too_deep()
    if HALF_PAIR.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("has text that is not Unicode (half of a surrogate pair)") from None
    return content


def _too_deep() -> ValueError:
    return ValueError(f"has values nested more than {DEEPEST} deep")
