import os
import signal
import time

import pytest

from engine.config import Grammar
from engine.runtime import grammar_compiler
from engine.runtime.grammar import Grammars
from engine.runtime.grammar_compiler import GrammarCompiler
from engine.runtime.tokenizer import Tokenizer
from tests.tiny_artifact import write_tokenizer

pytest.importorskip("xgrammar", reason="xgrammar is not installed")

VOCABULARY = {"vocab_size": 320, "eos_token_ids": (1,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, chat_template=None)
    return path


@pytest.fixture(scope="module")
def compiler(folder):
    made = GrammarCompiler(folder, **VOCABULARY)
    yield made
    made.close()


def test_what_is_compiled_elsewhere_is_learned_as_if_it_were_compiled_here(compiler, folder):
    grammar = Grammar(kind="regex", text="ab*")
    compiled = compiler.compile(grammar)
    assert compiled.kind == "compiled"
    here, there = (Grammars(Tokenizer(folder), **VOCABULARY) for _ in range(2))
    there.learn(grammar, compiled)
    known = there.compiled(grammar)
    assert there.compiled(grammar) is known
    for answer in ([], [Tokenizer(folder).token_id("a")]):
        assert there.constraint(grammar).allowed(answer) == here.constraint(grammar).allowed(answer)


def test_a_grammar_that_is_not_valid_is_said_and_the_next_is_compiled(compiler):
    with pytest.raises(ValueError, match="The regex cannot be followed"):
        compiler.compile(Grammar(kind="regex", text="("))
    assert compiler.compile(Grammar(kind="json")).text


def test_a_process_that_ends_in_the_middle_is_said_and_started_again(compiler):
    process = compiler._process.process_id
    os.kill(process, signal.SIGKILL)
    while compiler._process.process_id is not None:
        time.sleep(0.01)
    assert compiler.compile(Grammar(kind="json")).text
    assert compiler._process.process_id not in (None, process)


def test_what_is_too_large_is_refused(compiler, monkeypatch):
    monkeypatch.setattr(grammar_compiler, "LARGEST", 10)
    with pytest.raises(ValueError, match="too large"):
        compiler.compile(Grammar(kind="json"))


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json"):
        GrammarCompiler(tmp_path, **VOCABULARY).compile(Grammar(kind="json"))
