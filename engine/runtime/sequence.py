"""One request as the scheduler sees it: tokens, pages, and three numbers."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Protocol

from engine.config import Sampling
from engine.wording import shown

# Stands in `Sequence.tokens` for a token that is not read yet.
PENDING = -1
MOST_LOGPROBS = 20
LARGEST_BIAS = 100.0
# Beyond this a logit divided by a repetition penalty may overflow.
LEAST_PENALTY = 0.01


class Constraint(Protocol):
    """Says what the next token of one answer may be; see `engine.runtime.grammar`."""

    def allowed(self, answer: list[int]) -> array[int]: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """The tokens of one request, prompt first, and how far they are computed.

    `cached` tokens have their K and V in `pages`, the next step computes `scheduled` more, and a token is drawn when
    the two together reach `len(sequence)`. A prefix hit starts with `cached` above zero, a chunk of a long prompt
    stays below `len`, a decode step has `scheduled` 1, and a preempted sequence has `cached` 0: nothing else says
    where a sequence stands.

    The last `pending` entries of `tokens` are PENDING: tokens that the device is drawing and the host has not read yet.

    `limit` is the length at which it ends; a sequence whose prompt has this length draws no token. With `scored`
    the logits of every position are wanted, so it takes no page from the prefix index and puts none there.
    `rope_base` is the base of its rotary embedding where the model's depends on the limit: fixed from first to last
    token, since K in the cache is turned by it. `constraint` is the grammar that the answer follows.
    `admitted` is when the engine first began with it, by the machine's monotonic clock; 0 before.
    `turn` is the step that it was last in, where steps are shared in turns.
    `needs_host` says that its tokens are drawn with what the host makes of those before: a grammar's mask, the counts
    of a penalty. Such a token cannot be drawn before the last one is known here. A `greedy` one's next token is the
    likeliest, but for end tokens that it ignores.
    Engines are shared fairly between owners; among one owner's, lower `priority` comes first, then `arrival`.
    """

    request_id: str
    tokens: list[int]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    scored: bool = False
    rope_base: float | None = None
    constraint: Constraint | None = None
    owner: str = ""
    priority: int = 0

    cached: int = 0
    scheduled: int = 0
    pending: int = 0
    published: int = 0
    ended: bool = False
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prompt_length: int = 0
    prefix_hit: int | None = None
    arrival: int = 0
    admitted: float = 0.0
    turn: int = 0
    needs_host: bool = field(init=False)
    greedy: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        sampling = self.sampling
        self.needs_host = (
            self.constraint is not None
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
        )
        plain = not self.needs_host and not sampling.logit_bias and sampling.logprobs is None
        self.greedy = sampling.temperature == 0 and plain

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def known(self) -> int:
        """How many of the tokens the host has read."""
        return len(self.tokens) - self.pending

    @property
    def draws(self) -> bool:
        """True when the scheduled step reaches the last token and there is room for one more."""
        return self.scheduled > 0 and self.cached + self.scheduled == len(self.tokens) < self.limit

    @property
    def answer(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def prefix_root(self) -> bytes:
        """What the digest of the first page starts from: sequences of different bases share no page."""
        return b"" if self.rope_base is None else array("d", [self.rope_base]).tobytes()

    @property
    def scheduled_tokens(self) -> list[int]:
        return self.tokens[self.cached : self.cached + self.scheduled]


def check_sampling(sampling: Sampling, *, vocab_size: int) -> None:
    """Raise ValueError, naming field, value and range, for options that no request can have."""
    top, ids = sampling.logprobs, f"ids from 0 to {vocab_size - 1}"
    penalties = "a number from -2 to 2"
    rules = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", sampling.temperature >= 0 and math.isfinite(sampling.temperature), "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 <= sampling.top_p <= 1, "from 0 to 1 (off)"),
        ("min_p", 0 <= sampling.min_p <= 1, "from 0 (off) to 1"),
        (
            "repetition_penalty",
            LEAST_PENALTY <= sampling.repetition_penalty <= 1 / LEAST_PENALTY,
            f"from {LEAST_PENALTY:g} to {1 / LEAST_PENALTY:g}, and 1 is off",
        ),
        ("presence_penalty", -2 <= sampling.presence_penalty <= 2, penalties),
        ("frequency_penalty", -2 <= sampling.frequency_penalty <= 2, penalties),
        (
            "logit_bias",
            all(0 <= token < vocab_size and abs(bias) <= LARGEST_BIAS for token, bias in sampling.logit_bias),
            f"{ids} with a bias from -{LARGEST_BIAS:g} to {LARGEST_BIAS:g} each",
        ),
        ("stop", all(sampling.stop), "a list of strings, none of them empty"),
        ("stop_token_ids", all(0 <= token < vocab_size for token in sampling.stop_token_ids), ids),
        ("logprobs", top is None or 0 <= top <= MOST_LOGPROBS, f"none, or from 0 to {MOST_LOGPROBS}"),
        (
            "ignore_eos",
            not (sampling.ignore_eos and sampling.grammar),
            "false with a grammar, whose answer ends where the grammar does",
        ),
    )
    for name, holds, allowed in rules:
        if not holds:
            wrong = [token for token, _ in sampling.logit_bias if not 0 <= token < vocab_size]
            if name == "logit_bias" and wrong:
                raise ValueError(f"{name} has the token id {wrong[0]}, but must be {allowed}.")
            raise ValueError(f"{name} is {shown(getattr(sampling, name))}, but must be {allowed}.")
