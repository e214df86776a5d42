"""One request as the scheduler sees it: tokens, pages, and three numbers."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from engine.config import Sampling


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """The tokens of one request, prompt first, and how far they are computed.

    `cached` tokens have their K and V in `pages`, the next step computes `scheduled` more, and a token is drawn when
    the two together reach `len(sequence)`. A prefix hit starts with `cached` above zero, a chunk of a long prompt
    stays below `len`, a decode step has `scheduled` 1, and a preempted sequence has `cached` 0: nothing else says
    where a sequence stands.

    `limit` is the length at which it ends; a sequence whose prompt has this length draws no token. With `scored`
    the logits of every position are wanted, so it takes no page from the prefix index and puts none there.
    `rope_base` is the base of its rotary embedding where the model's depends on the limit: fixed from first to last
    token, since K in the cache is turned by it.
    """

    request_id: str
    tokens: list[int]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    scored: bool = False
    rope_base: float | None = None

    cached: int = 0
    scheduled: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prompt_length: int = 0
    prefix_hit: int | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def draws(self) -> bool:
        """True when the scheduled step reaches the last token and there is room for one more."""
        return self.scheduled > 0 and self.cached + self.scheduled == len(self.tokens) < self.limit

    @property
    def prefix_root(self) -> bytes:
        """What the digest of the first page starts from: sequences of different bases share no page."""
        return b"" if self.rope_base is None else array("d", [self.rope_base]).tobytes()

    @property
    def scheduled_tokens(self) -> list[int]:
        return self.tokens[self.cached : self.cached + self.scheduled]


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError, naming field, value and range, for options that no request can have."""
    rules = (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", sampling.temperature >= 0 and math.isfinite(sampling.temperature), "0 (greedy) or more"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 <= sampling.top_p <= 1, "from 0 to 1 (off)"),
        (
            "repetition_penalty",
            sampling.repetition_penalty > 0 and math.isfinite(sampling.repetition_penalty),
            "above 0, and 1 is off",
        ),
        ("stop", all(sampling.stop), "a list of strings, none of them empty"),
    )
    for name, holds, allowed in rules:
        if not holds:
            raise ValueError(f"{name} is {getattr(sampling, name)!r}, but must be {allowed}.")
