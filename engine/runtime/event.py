"""What the engine says about a request. Without torch, so that a process that only reads events stays small."""

from __future__ import annotations

from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class TokenLogprob(NamedTuple):
    """The natural logarithm of a token's probability, and `top`: (id, logarithm) of the likeliest, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Event(NamedTuple):
    """News of one request: its new tokens and the text that they add, which stop strings never reach. A tuple: there is
    one for every token, it crosses between processes as it is, and a dataclass takes five times as long to make.

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
