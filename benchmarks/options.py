"""`key=value` options of the benchmarks: a dataclass says names, types, defaults and help, and is what comes out."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options")
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option(default: Any, text: str, *, choices: Sequence[str] = (), least: float | None = None) -> Any:
    """A field of an options class: its default, one line of help, and what values it takes beside its type."""
    return field(default=default, metadata={"help": text, "choices": tuple(choices), "least": least})


def read_options(kind: type[Options], argv: Sequence[str], *, prog: str, about: str) -> Options:
    """`kind` filled from `key=value` arguments. Prints the help and raises SystemExit(0) for `-h` and `--help`.

    ValueError, one paragraph, for an argument of another form, a key that is not there or twice, and a wrong value.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    if "-h" in argv or "--help" in argv:
        print(help_text(kind, prog=prog, about=about))
        raise SystemExit(0)
    given: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(
                f"{argument!r} is not understood: options are given as key=value. `{prog} --help` lists them."
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no option {key!r}. {meant}`{prog} --help` lists the options.")
        if key in given:
            raise ValueError(f"{key} is given twice: give it once.")
        given[key] = _value(key, text, hints[key], known[key])
    return kind(**given)


def help_text(kind: type[Any], *, prog: str, about: str) -> str:
    """The usage line, what the benchmark does, and every option with its default."""
    every = fields(kind)
    width = max(len(each.name) for each in every)
    lines = [f"usage: {prog} [KEY=VALUE ...]", "", about.strip(), "", "Options, with their defaults:"]
    for each in every:
        default = "" if each.default in (None, MISSING) else f" ({_shown(each.default)})"
        choices = each.metadata.get("choices")
        lines.append(
            f"  {each.name:{width}}  {each.metadata['help']}{': ' + ', '.join(choices) if choices else ''}{default}"
        )
    return "\n".join(lines)


def _value(key: str, text: str, hint: Any, of: Field[Any]) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        parts = [part.strip() for part in text.split(",")]
        return tuple(_one(key, part, kind, of) for part in parts)
    return _one(key, text, hint, of)


def _one(key: str, text: str, kind: Any, of: Field[Any]) -> Any:
    choices, least = of.metadata["choices"], of.metadata["least"]
    if choices and text not in choices:
        raise ValueError(f"{key} is {text!r}, but must be one of {', '.join(choices)}.")
    if not text:
        raise ValueError(f"{key} is empty: give a value, or leave the option out.")
    if kind is bool:
        if text.lower() not in SWITCH:
            raise ValueError(f"{key} is {text!r}, but must be true or false.")
        return SWITCH[text.lower()]
    if kind in (str, Path):
        return kind(text)
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{key} is {text!r}, but must be {KINDS[kind]}.") from None
    if not math.isfinite(value):
        raise ValueError(f"{key} is {text!r}, but must be {KINDS[kind]}.")
    if least is not None and value < least:
        raise ValueError(f"{key} is {text}, but must be at least {least:g}.")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
