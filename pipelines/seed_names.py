"""The model names of LMDeploy v0.1.0, which its commands ask for: the longest session and the chat template of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedName:
    """`session_len` has the reference's 8 tokens of room. `template` is one of ours; None for a name without one, or
    with one that the reference leaves to its configuration (puyu) or that we do not have (ultracm, ultralm)."""

    session_len: int = 2056
    template: str | None = None


INTERNLM = SeedName(template="internlm")
INTERNLM_LONG = SeedName(template="internlm", session_len=8200)
VICUNA = SeedName(template="vicuna")
LLAMA2 = SeedName(template="llama2", session_len=4104)
QWEN = SeedName(template="qwen", session_len=8200)
SEED_NAMES = {
    "base": SeedName(),
    "llama": SeedName(),
    "vicuna": VICUNA,
    "wizardlM": VICUNA,
    "internlm": SeedName(),
    "internlm-chat": INTERNLM,
    "internlm-chat-7b": INTERNLM,
    "internlm-chat-20b": INTERNLM_LONG,
    "internlm-chat-7b-8k": INTERNLM_LONG,
    "internlm-20b": SeedName(session_len=4104),
    "baichuan-7b": SeedName(),
    "baichuan2-7b": SeedName(template="baichuan2"),
    "puyu": SeedName(),
    "llama2": LLAMA2,
    "codellama": LLAMA2,
    "qwen-7b": QWEN,
    "qwen-14b": QWEN,
    "solar": SeedName(template="solar"),
    "ultracm": SeedName(),
    "ultralm": SeedName(),
    "yi": SeedName(template="chatml"),
}
