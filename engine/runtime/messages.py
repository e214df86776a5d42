"""What crosses between a client and its engine process: options as msgpack's maps, events as its lists, and back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from engine.config import Grammar, Sampling
from engine.runtime.event import Event, TokenLogprob

SAMPLING_FIELDS = tuple(each.name for each in fields(Sampling))


def pack_sampling(sampling: Sampling) -> dict[str, Any]:
    """The options that are not at their defaults."""
    packed: dict[str, Any] = {}
    for name in SAMPLING_FIELDS:
        value = getattr(sampling, name)
        if value != getattr(DEFAULT, name):
            packed[name] = [value.kind, value.text] if isinstance(value, Grammar) else value
    return packed


def unpack_sampling(packed: dict[str, Any]) -> Sampling:
    options = dict(packed)
    for name in ("stop", "stop_token_ids"):
        options[name] = tuple(options.get(name, ()))
    options["logit_bias"] = tuple((token, bias) for token, bias in options.get("logit_bias", ()))
    if "grammar" in options:
        kind, text = options["grammar"]
        options["grammar"] = Grammar(kind=kind, text=text)
    return Sampling(**options)


def unpack_event(packed: tuple[Any, ...]) -> Event:
    """The event of which only the tuple has arrived."""
    event: Event = tuple.__new__(Event, packed)  # Event._make counts the fields, of which the engine sent all
    return event._replace(logprobs=tuple(map(TokenLogprob._make, event.logprobs))) if event.logprobs else event


DEFAULT = Sampling()
