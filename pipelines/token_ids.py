"""BOS and EOS of a model whose configuration names none: its tokenizer's, as LMDeploy v0.1.0 takes them always."""

from __future__ import annotations

from dataclasses import replace

from engine.config import ModelConfig
from engine.runtime.tokenizer import Tokenizer


def with_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model with the ids that config.ini has to say. Meta's params.json says none, Qwen's config.json no BOS."""
    return replace(
        config,
        bos_token_id=tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id,
        eos_token_ids=config.eos_token_ids or tokenizer.eos_token_ids,
    )
