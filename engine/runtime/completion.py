"""A whole answer, put together from its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.runtime.event import Event, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. `token_ids` has the end token, or the tokens of the stop string; `text` has neither."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


def completion_of(events: Sequence[Event]) -> Completion:
    """The answer whose events these are, the last one of which ends it."""
    last = events[-1]
    assert last.finish_reason is not None
    return Completion(
        token_ids=tuple(token for event in events for token in event.token_ids),
        text="".join(event.text for event in events),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
    )
