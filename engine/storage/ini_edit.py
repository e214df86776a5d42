"""One value of a config.ini changed or taken out, every other byte as it was."""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.storage import ingot_section
from engine.storage.config_ini import SECTION, read_config_ini


def write_with_value(source: Path, target: Path, key: str, value: int) -> None:
    """Write `source` as `target` (the same file is allowed) with another value of a key of its section [llama].

    A key that an old file does not have yet comes first in the section. The target is there whole or not at all, and is
    a file of its own: what is linked to `source` stays as it is.
    ValueError for a file that is no config.ini, and for a value that it cannot have.
    """
    text = source.read_text(encoding="utf-8")
    changed, count = re.subn(
        rf"^({re.escape(key)}[ \t]*[=:][ \t]*)\S+[ \t]*$", rf"\g<1>{value}", text, flags=re.MULTILINE
    )
    if count == 0:
        changed, count = re.subn(rf"^\[{SECTION}\][ \t]*$", rf"[{SECTION}]\n{key} = {value}", text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{source} does not have the key {key} once: it is no config.ini of a TurboMind workspace")
    _write(changed, target)


def write_without(source: Path, target: Path, key: str) -> None:
    """Write `source` as `target` (the same file is allowed) without a key of its section [ingot], and without that
    section where nothing else is in it. The target is there whole or not at all."""
    text = source.read_text(encoding="utf-8")
    text = re.sub(rf"^{re.escape(key)}[ \t]*[=:].*\n", "", text, flags=re.MULTILINE)
    _write(re.sub(rf"^\[{ingot_section.SECTION}\]\s*\Z", "", text, flags=re.MULTILINE), target)


def _write(text: str, target: Path) -> None:
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        read_config_ini(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
