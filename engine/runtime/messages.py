"""What crosses between a client and its engine process: dataclasses as msgpack's lists and maps, and back."""

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


def pack_event(event: Event) -> list[Any]:
    """A list, by hand: dataclasses.astuple would copy deeply, for every token of every request."""
    counts = [event.prompt_tokens, event.cached_tokens, event.completion_tokens]
    logprobs = [[each.token_id, each.logprob, each.top] for each in event.logprobs]
    return [event.request_id, event.token_ids, event.text, event.finish_reason, *counts, event.admitted, logprobs]


def unpack_event(packed: list[Any]) -> Event:
    request_id, token_ids, text, finish_reason, *counts, admitted, logprobs = packed
    prompt_tokens, cached_tokens, completion_tokens = counts
    return Event(
        request_id=request_id,
        token_ids=tuple(token_ids),
        text=text,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        admitted=admitted,
        logprobs=tuple(
            TokenLogprob(token_id=token, logprob=logprob, top=tuple((other, value) for other, value in top))
            for token, logprob, top in logprobs
        ),
    )


DEFAULT = Sampling()
