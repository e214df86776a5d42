"""What the engine says about a request. Without torch, so that a process that only reads events stays small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and `top`: (id, logarithm) of the likeliest, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """News of one request: its new tokens and the text that they add, which stop strings never reach.

    `finish_reason` is None while more is to come: "stop" is an end token or a stop string, "length" is
    max_new_tokens or session_len. `cached_tokens` of the prompt came from the prefix cache. `logprobs` has an entry for
    each token where they were asked for. `admitted` is when the engine began with the request, by the clock of
    `time.monotonic`, which all processes of a machine share; 0 where it never did.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    admitted: float = 0.0
