"""What `ingot serve` can be told (the group conf/serve), and what the application gets out of it."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from engine.cache_size import CACHE_SIZES
from engine.config import COUNTS, EngineConfig
from server.keys import Keys

if TYPE_CHECKING:
    from server.traces import Traces

ACCESS_LOGS = ("text", "json", "none")
FROM_ENVIRONMENT = "env"
COLLECTOR = re.compile(r"https?://[^\s@]+")
ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_ATTRIBUTE = "it is an attribute of the model"
IMMUTABLE = {
    "weight_type": "how weights are stored is part of the recipe that was measured",
    "group_size": "how weights are quantized is part of the recipe that was measured",
    "tensor_para_size": "an artifact of any tensor-parallel degree runs with any, which is serve.tp",
    **dict.fromkeys(("head_num", "kv_head_num", "vocab_size", "num_layer", "inter_size", "norm_eps"), _ATTRIBUTE),
    **dict.fromkeys(("attn_bias", "rotary_embedding", "rope_theta", "size_per_head"), _ATTRIBUTE),
    **dict.fromkeys(("start_id", "end_id"), "it is a token of the model's tokenizer"),
}
MEANINGLESS = (
    "max_context_token_num",
    "step_length",
    "cache_chunk_size",
    "use_context_fmha",
    "extra_tokens_per_iter",
    "max_prefill_iters",
)
"""Keys of config.ini that are there for TurboMind's own engine: a build can set them, and this engine reads none."""
UNMEASURED = ("quant_policy", "rope_scaling_factor", "use_logn_attn", "max_position_embeddings")
"""Options that change what a model computes: an artifact's evaluation was made without them."""


@dataclass(slots=True, kw_only=True)
class ServeConfig:
    """The fields of conf/serve; a value out of range is a ValueError.

    From `device` on they are EngineConfig's, and None is what the workspace says.
    """

    host: str = "127.0.0.1"
    port: int = 23333
    model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    max_body_bytes: int = 8 << 20
    head_timeout: float = 20.0
    body_timeout: float = 60.0
    max_requests: int = 1024
    request_timeout: float | None = None
    drain_timeout: float = 60.0
    self_test: bool = True
    access_log: str = "text"
    traces: str | None = None
    session_timeout: float = 3600.0
    max_sessions: int = 1024
    device: str = "cpu"
    dtype: str = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    num_tokens_per_iter: int | None = None
    cache_max_entry_count: int | float | str | None = None
    cache_block_seq_len: int | None = None
    prefix_caching: bool = True
    deterministic: bool = False
    quant_policy: int | None = None
    rope_scaling_factor: float | None = None
    use_logn_attn: int | bool | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        counts = [(name, getattr(self, name)) for name in COUNTS]
        rules = (
            ("port", 0 <= self.port <= 65535, "0 to 65535 (0 picks a free one)"),
            ("model_name", self.model_name != "", "null or a name"),
            (
                "cors_origins",
                all(origin == "*" or ORIGIN.fullmatch(origin) for origin in self.cors_origins),
                'a list of origins such as [https://example.org], or ["*"] for all',
            ),
            ("max_body_bytes", 1024 <= self.max_body_bytes <= 1 << 28, f"from 1024 to {1 << 28}"),
            ("head_timeout", 0 < self.head_timeout < math.inf, "a number of seconds above 0"),
            ("body_timeout", 0 < self.body_timeout < math.inf, "a number of seconds above 0"),
            ("max_requests", self.max_requests >= 1, "at least 1"),
            (
                "request_timeout",
                self.request_timeout is None or 0 < self.request_timeout < math.inf,
                "null (no limit) or a number of seconds above 0",
            ),
            ("drain_timeout", 0 <= self.drain_timeout < math.inf, "a number of seconds"),
            ("access_log", self.access_log in ACCESS_LOGS, ", ".join(ACCESS_LOGS[:-1]) + f" or {ACCESS_LOGS[-1]}"),
            (
                "traces",
                self.traces in (None, FROM_ENVIRONMENT) or bool(COLLECTOR.fullmatch(self.traces or "")),
                f"null, the URL of a collector (http://127.0.0.1:4318), or {FROM_ENVIRONMENT}",
            ),
            ("session_timeout", 0 < self.session_timeout < math.inf, "a number of seconds above 0"),
            ("max_sessions", self.max_sessions >= 1, "at least 1"),
            *(
                (name, count is None or count > 0, "null (what the artifact says) or at least 1")
                for name, count in counts
            ),
            ("cache_max_entry_count", self.cache_max_entry_count != 0, CACHE_SIZES),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"serve.{name} is {getattr(self, name)!r}, but must be {allowed}.")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("serve.api_key and serve.api_key_file are both given: give the file alone.")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("serve.tls_cert_file and serve.tls_key_file are two halves of TLS: give both, or neither.")
        try:
            self.engine_config()
        except ValueError as error:
            raise ValueError(f"serve.{error}") from error

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            device=self.device,
            dtype=self.dtype,  # type: ignore[arg-type]  # EngineConfig checks it
            tp=self.tp,
            session_len=self.session_len or 0,
            max_batch_size=self.max_batch_size or 0,
            num_tokens_per_iter=self.num_tokens_per_iter or 0,
            cache_max_entry_count=0 if self.cache_max_entry_count is None else self.cache_max_entry_count,
            cache_block_seq_len=self.cache_block_seq_len or 0,
            prefix_caching=self.prefix_caching,
            deterministic=self.deterministic,
            quant_policy=self.quant_policy,
            rope_scaling_factor=self.rope_scaling_factor,
            use_logn_attn=self.use_logn_attn,  # type: ignore[arg-type]  # 0 and 1 are false and true
            max_position_embeddings=self.max_position_embeddings,
        )

    @property
    def unmeasured(self) -> list[str]:
        """The options given here that an artifact's evaluation was made without."""
        return [name for name in UNMEASURED if getattr(self, name) is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What is served and what is known about it. `artifact_id` is None for a folder that nobody verified, which
    /v1/models says as `verified: false`."""

    name: str
    artifact_id: str | None = None
    recipe: str | None = None
    verdict: str | None = None
    waiver: str | None = None

    @property
    def short_id(self) -> str | None:
        return self.artifact_id[:12] if self.artifact_id else None

    @property
    def fingerprint(self) -> str | None:
        """Artifact, recipe and verdict of its evaluation, as `3f9c1b2a77e0-w4a16-kv8-pass`."""
        if self.artifact_id is None:
            return None
        return f"{self.short_id}-{self.recipe or 'unknown'}-{self.verdict or 'unmeasured'}"

    def answers_to(self, name: str) -> bool:
        """True for the served name, the artifact's id and its first 12 digits."""
        return name in {self.name, self.artifact_id, self.short_id}


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """What the application needs beside an engine. With `keys`, every route asks for one of them. Pages of no
    origins but `cors_origins` can read answers. A body has at most `max_body_bytes`, and `body_timeout` seconds to
    come. A key may have `max_requests` answers waiting or running, and none may take more than `request_timeout`
    seconds. Sessions that the server keeps are forgotten after `session_timeout` idle seconds, and beyond
    `max_sessions` of one key. A line of JSON about every request goes to `access_log`, and spans about those that
    generate to `traces`."""

    model: ServedModel
    keys: Keys = field(default_factory=dict)
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 8 << 20
    body_timeout: float = 60.0
    max_requests: int = 1024
    request_timeout: float | None = None
    session_timeout: float = 3600.0
    max_sessions: int = 1024
    access_log: TextIO | None = None
    traces: Traces | None = None


def check_exposure(host: str, keys: Keys) -> None:
    """ValueError where everybody on the network could use the server: another address than loopback, and no key."""
    if not keys and not is_loopback(host):
        raise ValueError(
            f"serve.host is {host!r}, which other machines can reach, and no key is set. Put a key into a file and "
            "give serve.api_key_file=FILE (or INGOT_API_KEY), or serve on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
