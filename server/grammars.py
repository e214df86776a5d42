"""Grammars of requests, compiled outside of the engine and outside of this process, each once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.config import Grammar
from engine.runtime.client import EngineClient
from engine.runtime.grammar_compiler import GrammarCompiler

MOST_KNOWN = 256


class PreparedGrammars:
    """What the engine has been told; the latest used are remembered longest."""

    def __init__(self, client: EngineClient, tokenizer_folder: Path) -> None:
        self._client = client
        self._folder = tokenizer_folder
        self._compiler: GrammarCompiler | None = None
        self._known: OrderedDict[Grammar, None] = OrderedDict()

    def unknown(self, grammar: Grammar) -> Callable[[], Grammar] | None:
        """None where the engine knows `grammar`, else what compiles it for `tell`: slow, for a thread. That raises
        ValueError for one that is not valid or too large."""
        if grammar in self._known:
            self._known.move_to_end(grammar)
            return None
        if self._compiler is None:
            client = self._client
            client.warm_grammars()
            self._compiler = GrammarCompiler(
                self._folder, vocab_size=client.vocab_size, eos_token_ids=client.eos_token_ids
            )
        return partial(self._compiler.compile, grammar)

    async def tell(self, grammar: Grammar, compiled: Grammar) -> None:
        """Make sure that the engine knows what a grammar is compiled to."""
        await self._client.learn_grammar(grammar, compiled)
        self._known[grammar] = None
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    def close(self) -> None:
        if self._compiler is not None:
            self._compiler.close()
