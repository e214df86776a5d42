"""What `ingot serve` can be told (the group conf/serve), and what the application gets out of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from engine.config import EngineConfig

DTYPES = ("auto", "float32", "float16", "bfloat16")
IMMUTABLE = {
    "quant_policy": "whether the KV cache is int8 is part of the recipe that was measured",
    "weight_type": "how weights are stored is part of the recipe that was measured",
    "group_size": "how weights are quantized is part of the recipe that was measured",
    "tp": "an artifact of any tensor-parallel degree runs on the devices there are",
    "rope_theta": "it is an attribute of the model",
    "rotary_embedding": "it is an attribute of the model",
    "vocab_size": "it is an attribute of the model",
    "num_layer": "it is an attribute of the model",
    "head_num": "it is an attribute of the model",
    "kv_head_num": "it is an attribute of the model",
    "size_per_head": "it is an attribute of the model",
    "inter_size": "it is an attribute of the model",
    "norm_eps": "it is an attribute of the model",
}


@dataclass(slots=True, kw_only=True)
class ServeConfig:
    """The fields of conf/serve; a value out of range is a ValueError. From `device` on they are EngineConfig's."""

    host: str = "127.0.0.1"
    port: int = 23333
    model_name: str | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    session_len: int = 0
    max_batch_size: int = 64
    num_tokens_per_iter: int = 512
    cache_max_entry_count: float = 0.5
    cache_block_seq_len: int = 64
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        rules = (
            ("port", 0 <= self.port <= 65535, "0 to 65535 (0 picks a free one)"),
            ("model_name", self.model_name != "", "null or a name"),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
            ("session_len", self.session_len >= 0, "0 (what the artifact says) or a number of tokens"),
            ("max_batch_size", self.max_batch_size >= 1, "at least 1"),
            ("num_tokens_per_iter", self.num_tokens_per_iter >= 1, "at least 1"),
            ("cache_max_entry_count", self.cache_max_entry_count > 0, "a share of free memory or a number of pages"),
            ("cache_block_seq_len", self.cache_block_seq_len >= 1, "at least 1"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"serve.{name} is {getattr(self, name)!r}, but must be {allowed}.")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("serve.api_key and serve.api_key_file are both given: give the file alone.")

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            device=self.device,
            dtype=self.dtype,  # type: ignore[arg-type]  # one of DTYPES, checked above
            session_len=self.session_len,
            max_batch_size=self.max_batch_size,
            num_tokens_per_iter=self.num_tokens_per_iter,
            cache_max_entry_count=self.cache_max_entry_count,
            cache_block_seq_len=self.cache_block_seq_len,
            prefix_caching=self.prefix_caching,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What is served and what is known about it. `artifact_id` is None for a folder that nobody verified."""

    name: str
    artifact_id: str | None = None
    recipe: str | None = None
    verdict: str | None = None
    waiver: str | None = None

    @property
    def fingerprint(self) -> str | None:
        return self.artifact_id[:12] if self.artifact_id else None

    def answers_to(self, name: str) -> bool:
        """True for the served name, the artifact's id and its first 12 digits."""
        return name in {self.name, self.artifact_id, self.fingerprint}


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """What the application needs beside an engine. With an `api_key`, every route asks for it."""

    model: ServedModel
    api_key: str | None = None


def check_exposure(host: str, api_key: str | None) -> None:
    """ValueError where everybody on the network could use the server: another address than loopback, and no key."""
    if api_key is None and not is_loopback(host):
        raise ValueError(
            f"serve.host is {host!r}, which other machines can reach, and no key is set. Put a key into a file and "
            "give serve.api_key_file=FILE (or INGOT_API_KEY), or serve on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
