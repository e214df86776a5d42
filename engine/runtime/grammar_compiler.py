"""Compiles grammars in a process with limits, for a server that must outlive any grammar."""

from __future__ import annotations

from pathlib import Path

from engine.config import Grammar
from engine.runtime.confined_process import ConfinedProcess
from engine.wording import cut

SECONDS = 10
# xgrammar, torch and a vocabulary of 150,000 tokens take 1.5 GiB of addresses, half of it never touched.
MEMORY_BYTES = 4 << 30
LARGEST = 32 << 20


class GrammarCompiler:
    """For one tokenizer folder. The process starts with the first grammar, which takes seconds, and lives as long as
    this object. Calls from several threads take turns."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._process = ConfinedProcess(
            "engine.runtime.grammar_sandbox",
            {"folder": str(folder), "vocab_size": vocab_size, "eos_token_ids": list(eos_token_ids)},
            refused="grammars cannot be compiled here",
            ended=f"the grammar is too large: compiling it may take {SECONDS} s of computing and "
            f"{MEMORY_BYTES >> 20} MiB, and takes more",
        )

    def compile(self, grammar: Grammar) -> Grammar:
        """The grammar as kind `compiled`. ValueError where it is not valid, or takes more than SECONDS of computing or
        MEMORY_BYTES."""
        answer = self._process.ask({"kind": grammar.kind, "text": grammar.text})
        if "error" in answer:
            raise ValueError(cut(answer["error"], 1000))
        if len(answer["text"]) > LARGEST:
            raise ValueError(
                f"the grammar is too large: compiled it has {len(answer['text'])} bytes, of {LARGEST} allowed"
            )
        return Grammar(kind="compiled", text=answer["text"])

    def close(self) -> None:
        """End the process."""
        self._process.close()
