"""Formats of families: found by real templates, written into prompts, enforced by grammars that the parser reads."""

import json
import random
from pathlib import Path

import jsonschema
import pytest

from engine.runtime.chat_template import ChatTemplate
from engine.runtime.grammar import Grammars
from server.tool_formats import HERMES, INTERNLM2, LLAMA3, MISTRAL, tool_format, with_tools
from server.tool_grammar import call_grammar, free_grammar
from server.tool_parser import CallPiece, ToolParser
from server.tools import Tool
from tests.shared_data import shared

pytest.importorskip("xgrammar", reason="xgrammar is not installed")

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["city"],
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}),
    Tool.model_validate({"type": "function", "function": {"name": "clock"}}),
]
SPECIAL = ("[TOOL_CALLS]", "<|python_tag|>", "<|action_start|>", "<|plugin|>", "<|action_end|>")
END = 300


class Vocabulary:
    """A token for each byte, and the special tokens of all families."""

    def __init__(self, chat_template=None, special=SPECIAL):
        self.chat_template = chat_template
        self.special = special

    def token_id(self, text):
        return 256 + self.special.index(text) if text in self.special else None

    def token_bytes(self, token_id, *, skip_special=True):
        if token_id < 256:
            return bytes([token_id])
        if token_id < 256 + len(self.special):
            return b"" if skip_special else self.special[token_id - 256].encode()
        return b""


def random_answer(grammar, seed, prefix=b""):
    """An answer that the grammar allows, drawn evenly; its special tokens are shown."""
    vocabulary = Vocabulary()
    constraint = Grammars(vocabulary, vocab_size=320, eos_token_ids=(END,)).constraint(grammar)
    draw, answer = random.Random(seed), [*prefix]
    while True:
        mask = constraint.allowed(answer)
        allowed = [32 * word + bit for word, bits in enumerate(mask) for bit in range(32) if bits >> bit & 1]
        token = END if END in allowed else draw.choice(allowed)
        if token == END:
            return b"".join(vocabulary.token_bytes(token, skip_special=False) for token in answer).decode()
        answer.append(token)
        assert len(answer) < 1000


def calls_of(row, text):
    parser = ToolParser(row)
    pieces = parser.push(text) + parser.finish()
    calls = {}
    for piece in pieces:
        assert isinstance(piece, CallPiece), f"{piece!r} is content"
        name, arguments = calls.get(piece.index, ("", ""))
        calls[piece.index] = (name + (piece.name or ""), arguments + piece.arguments)
    return list(calls.values())


@pytest.mark.parametrize("row", [HERMES, MISTRAL, LLAMA3, INTERNLM2], ids=lambda row: row.name)
def test_an_enforced_call_is_one_that_the_parser_reads(row):
    grammar = call_grammar(TOOLS, row, Vocabulary(), many=False)
    names = set()
    for seed in range(12):
        [(name, arguments)] = calls_of(row, random_answer(grammar, seed))
        names.add(name)
        jsonschema.validate(json.loads(arguments), PARAMETERS if name == "weather" else {"type": "object"})
    assert names == {"weather", "clock"}


def test_what_begins_like_a_call_in_a_free_answer_is_one():
    grammar = free_grammar(TOOLS, HERMES)
    begun = b"I look.<tool_call>"
    for seed in range(5):
        parser = ToolParser(HERMES)
        content, *calls = parser.push(random_answer(grammar, seed, begun)) + parser.finish()
        assert content == "I look."
        arguments = "".join(call.arguments for call in calls)
        jsonschema.validate(json.loads(arguments), PARAMETERS if calls[0].name == "weather" else {"type": "object"})
    assert free_grammar(TOOLS, LLAMA3) is None


TEMPLATES = {
    "Qwen-Qwen2.5-7B-Instruct": HERMES,
    "Qwen-Qwen3-0.6B": HERMES,
    "meta-llama-Llama-3.1-8B-Instruct": LLAMA3,
    "meta-llama-Llama-3.2-3B-Instruct": LLAMA3,
    "mistralai-Mistral-Nemo-Instruct-2407": MISTRAL,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_write_tools_calls_and_results(name):
    folder = shared("data/configs/chat_templates")
    text = Path(folder / f"{name}.jinja").read_text(encoding="utf-8")
    row, native = tool_format(Vocabulary(text))
    assert (row, native) == (TEMPLATES[name], True)
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
    ]
    template = ChatTemplate(text, source="test", special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    tools = [tool.for_template() for tool in TOOLS]
    prompt = template.render(turns, add_generation_prompt=True, tools=tools)
    for word in ("weather", "clock", "Oslo", "sunny"):
        assert word in prompt
    written = prompt[prompt.index("Oslo") - 60 : prompt.index("Oslo") + 200]
    if row is not LLAMA3:  # whose calls have no mark to find them by
        start = prompt.rindex(row.begin.strip())
        parser = ToolParser(row)
        pieces = [each for each in parser.push(prompt[start:]) if isinstance(each, CallPiece)]
        assert pieces[0].name == "weather", written
        assert json.loads("".join(each.arguments for each in pieces[:2])) == {"city": "Oslo"}


def test_a_template_without_tools_is_told_of_them_in_a_message():
    row, native = tool_format(Vocabulary("{% for m in messages %}{{ m.content }}{% endfor %}", special=()))
    assert (row, native) == (HERMES, False)
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "look", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "a"},
    ]
    told = with_tools(turns, [tool.for_template() for tool in TOOLS], row)
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("be kind\n\n")
    assert '"name": "weather"' in told[0]["content"]
    assert told[2]["content"] == 'look\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert told[3]["content"] == "<tool_response>\nsunny\n</tool_response>"
    assert with_tools(turns[:2], [], row) == turns[:2]


def test_internlm2_is_told_in_its_own_words():
    row, native = tool_format(Vocabulary("{{ messages }}"))
    assert (row, native) == (INTERNLM2, False)
    turns = [{"role": "user", "content": "and?"}, {"role": "tool", "content": "sunny", "tool_call_id": "a"}]
    told = with_tools(turns, [TOOLS[1].for_template()], row)
    assert [turn["role"] for turn in told] == ["system name=<|plugin|>", "user", "environment name=<|plugin|>"]
