"""Grammars that an answer must follow, by xgrammar on the CPU: a bit for every token that may come next.

xgrammar is imported when the first grammar is asked for: it is an optional dependency, and takes a second.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.config import Grammar
from engine.wording import cut

if TYPE_CHECKING:
    import xgrammar

MOST_BYTES = 256 << 20
OBJECT = '{"type": "object"}'
# What stands for a special token: no text has this byte, so none is drawn for its text.
NO_TEXT = b"\xff"
LOCATION = re.compile(r"^\[[\d:]+\] \S+?:\d+: ")


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes: ...


class Grammars:
    """Compiles grammars for one vocabulary and remembers them up to `most_bytes`, the latest used longest.

    `vocab_size` is the model's: ids that the tokenizer does not know, and its special tokens, are in no text and so in
    no answer, except where a structural tag names a special token by its id, and in the text around its tags.
    """

    def __init__(
        self, vocabulary: Vocabulary, *, vocab_size: int, eos_token_ids: tuple[int, ...], most_bytes: int = MOST_BYTES
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._most_bytes = most_bytes
        self._compiled: dict[Grammar, xgrammar.CompiledGrammar] = {}

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """For one answer. ValueError, in xgrammar's words, for a grammar that is not valid."""
        return self._constraint(self.compiled(grammar))

    def compiled(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        """As `constraint`; the same object for the same grammar."""
        found = self._compiled.pop(grammar, None)
        if found is None:
            compiler = self._compiler
            with grammar_errors(grammar):
                found = self._compile(compiler, grammar)
                if not self._constraint(found).can_begin():
                    raise ValueError("it allows no answer")
        self._remember(grammar, found)
        return found

    def warm(self) -> None:
        """Import xgrammar and prepare the vocabulary, which takes seconds: from a thread, beside steps. What cannot be
        done is said when a grammar is asked for."""
        with suppress(ValueError):
            self._compiler  # noqa: B018 (it is made by being looked at)

    def learn(self, grammar: Grammar, compiled: Grammar) -> None:
        """Remember what another process of the same vocabulary made of a grammar, with `serialized`."""
        with grammar_errors(grammar):
            self._remember(grammar, self._compile(self._compiler, compiled))

    def _constraint(self, compiled: xgrammar.CompiledGrammar) -> GrammarConstraint:
        return GrammarConstraint(compiled, words=-(-self._vocab_size // 32), ends=self._eos_token_ids)

    def _remember(self, grammar: Grammar, compiled: xgrammar.CompiledGrammar) -> None:
        self._compiled.pop(grammar, None)
        self._compiled[grammar] = compiled
        while len(self._compiled) > 1 and sum(c.memory_size_bytes for c in self._compiled.values()) > self._most_bytes:
            del self._compiled[next(iter(self._compiled))]

    def serialized(self, grammar: Grammar) -> Grammar:
        """The grammar compiled, as text that `constraint` of the same vocabulary reads in a tenth of the time."""
        return Grammar(kind="compiled", text=self.compiled(grammar).serialize_json())

    def _compile(self, compiler: xgrammar.GrammarCompiler, grammar: Grammar) -> xgrammar.CompiledGrammar:
        match grammar.kind:
            case "json" | "json_schema":
                # Without free whitespace, which a model can go on with for ever.
                return compiler.compile_json_schema(grammar.text or OBJECT, any_whitespace=False)
            case "regex":
                return compiler.compile_regex(grammar.text)
            case "ebnf":
                return compiler.compile_grammar(grammar.text)
            case "structural_tag":
                return compiler.compile_structural_tag(grammar.text)
            case "compiled":
                restored: xgrammar.CompiledGrammar = _xgrammar().CompiledGrammar.deserialize_json(
                    grammar.text, self._tokenizer_info
                )
                return restored

    @cached_property
    def _compiler(self) -> xgrammar.GrammarCompiler:
        made: xgrammar.GrammarCompiler = _xgrammar().GrammarCompiler(
            self._tokenizer_info, max_threads=1, cache_enabled=False
        )
        return made

    @cached_property
    def _tokenizer_info(self) -> xgrammar.TokenizerInfo:
        if not self._eos_token_ids:
            raise ValueError("a grammar needs a model with an end token, and this one has none")
        tokens = [self._text(token_id) for token_id in range(self._vocab_size)]
        info: xgrammar.TokenizerInfo = _xgrammar().TokenizerInfo(
            tokens, vocab_size=self._vocab_size, stop_token_ids=list(self._eos_token_ids)
        )
        return info

    def _text(self, token_id: int) -> bytes:
        special = self._vocabulary.token_bytes(token_id, skip_special=False)
        return self._vocabulary.token_bytes(token_id) or (NO_TEXT if special else b"")


class GrammarConstraint:
    """Where one answer stands in its grammar."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, *, words: int, ends: tuple[int, ...]) -> None:
        self._matcher = _xgrammar().GrammarMatcher(compiled)
        self._bits = torch.empty((1, words), dtype=torch.int32)
        self._ends = ends
        self._accepted = 0

    def can_begin(self) -> bool:
        """Whether there is any answer to begin with; before the first token alone."""
        return not self._matcher.fill_next_token_bitmask(self._bits) or bool(self._bits.any())

    def allowed(self, answer: list[int]) -> array[int]:
        """Bit t % 32 of word t // 32 says whether token t may follow `answer`, which is that of the last call and more.

        Where the grammar wants a character that the vocabulary cannot write, the answer may only end.
        """
        for token in answer[self._accepted :]:
            accepted = self._matcher.accept_token(token)
            assert accepted, f"token {token} was drawn against the grammar"
        self._accepted = len(answer)
        if not self._matcher.fill_next_token_bitmask(self._bits):
            self._bits.fill_(-1)
        elif not self._bits.any():
            for token in self._ends:
                self._bits[0, token // 32] |= -(2**31) if token % 32 == 31 else 1 << token % 32
        return array("i", self._bits.numpy().tobytes())


@contextmanager
def grammar_errors(grammar: Grammar) -> Iterator[None]:
    """What xgrammar says of a grammar, as a ValueError without the places in its own source."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        said = LOCATION.sub("", " ".join(str(error).split()))
        kind = {"ebnf": "grammar", "json_schema": "schema"}.get(grammar.kind, grammar.kind)
        raise ValueError(f"The {kind} cannot be followed: {cut(said, 400)}") from error


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise ValueError(
            "xgrammar is not installed, which grammars, JSON schemas and forced tool calls need: "
            "make setup, or pip install --no-deps xgrammar"
        ) from error
    return xgrammar
