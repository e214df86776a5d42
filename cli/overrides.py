"""`key=value` arguments composed with conf/ by Hydra, and its complaints as one paragraph."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_type_hints

from cli.checkout import conf_folder
from pipelines.hydra_errors import paragraph
from server.config import IMMUTABLE, MEANINGLESS, ServeConfig

TEXT_KEYS = ("artifact", "folder", "waiver", "store", "serve.model_name", "serve.api_key", "serve.api_key_file")
TOP_KEYS = ("artifact", "folder", "waiver", "store", "serve")
BEFORE_QUOTE = re.compile(r"(\\*)('|\Z)")
BEFORE_INTERPOLATION = re.compile(r"(\\*)\$\{")
REFUSED = re.compile(r"Error merging override serve\.(?P<name>\w+)=(?P<value>\S*)")
KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    int | None: "null or a whole number",
    float | None: "null or a number",
}
NAME = "ingot_serve"


@dataclass(slots=True, kw_only=True)
class ServeCommand:
    """What `ingot serve` is told: one of `artifact` and `folder`, and the group serve."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"serve": "default"}])
    artifact: str | None = None
    folder: str | None = None
    waiver: str | None = None
    store: str | None = None
    serve: ServeConfig = field(default_factory=ServeConfig)


def quote(override: str) -> str:
    """`override` with a text value quoted for Hydra, whose grammar would read the id 3e911223 as a number.

    A value that the user has quoted already is left as it is.
    """
    key, equals, value = override.partition("=")
    if key not in TEXT_KEYS or not equals or value in ("", "null"):
        return override
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return override
    # Backslashes count only before a quote and before ${, where each must be written twice.
    value = BEFORE_INTERPOLATION.sub(lambda match: match[1] * 2 + "\\${", value)
    value = BEFORE_QUOTE.sub(lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return f"{key}='{value}'"


def compose_serve(overrides: Sequence[str]) -> ServeCommand:
    """The typed configuration of `ingot serve`; ValueError, one paragraph, for what it does not know or allow."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        check_known(override)
    ConfigStore.instance().store(name=NAME, node=ServeCommand)
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            composed = compose(NAME, overrides=[quote(override) for override in overrides])
        return cast(ServeCommand, OmegaConf.to_object(composed))
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} is not understood: {paragraph(error)}.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(refused_value(error) or paragraph(error)) from error


def refused_value(error: Exception) -> str | None:
    """What is wrong with a value of the wrong type; None for any other error."""
    said = REFUSED.search(paragraph(error))
    if said is None:
        return None
    kind = KINDS.get(get_type_hints(ServeConfig).get(said["name"]), "")
    return None if not kind else f"serve.{said['name']} is {said['value']!r}, but must be {kind}."


def check_known(override: str) -> None:
    """Refuse what is no `key=value`, an unknown key, and a key of the artifact itself, which says why it is fixed."""
    key, equals, _ = override.partition("=")
    if not equals or not key[:1].isalpha():
        meant = f"artifact={override}" if override[:1].isalnum() else "serve.port=23333"
        raise ValueError(f"{override!r} is not understood: options are given as key=value, such as {meant}.")
    name = key.removeprefix("serve.")
    if name in IMMUTABLE:
        raise ValueError(f"{key} belongs to the artifact and cannot be set when serving: {IMMUTABLE[name]}.")
    if name in MEANINGLESS:
        raise ValueError(
            f"{key} is there for TurboMind's own engine, and this one does nothing with it: a build writes it into "
            f"config.ini (ini.{name}=...)."
        )
    known = [*TOP_KEYS, *(f"serve.{each.name}" for each in fields(ServeConfig))]
    if key not in known:
        near = [f"serve.{key}"] if f"serve.{key}" in known else difflib.get_close_matches(key, known, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no option {key!r}. {meant}`ingot serve --help` lists the options.")
