import random

import pytest

from server.tool_formats import HERMES, INTERNLM2, LLAMA3, MISTRAL
from server.tool_parser import CallPiece, ToolParser

# (row, answer, content, calls)
CASES = [
    (
        HERMES,
        'I look. <tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [1]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        "I look. ",
        [("f", '{"a": "}\\"{", "b": [1]}'), ("g", "{}")],
    ),
    (HERMES, "only <tool_cal text", "only <tool_cal text", []),
    (HERMES, "<tool_call>\nbroken\n</tool_call> after", "<tool_call>\nbroken\n</tool_call> after", []),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\nso be it', "so be it", [("f", "{}")]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut')]),
    (HERMES, '<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": [1]}'), ("g", "{}")],
    ),
    (MISTRAL, "no call, [brackets]", "no call, [brackets]", []),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (
        LLAMA3,
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    (LLAMA3, 'text {"name": "f", "parameters": {}}', 'text {"name": "f", "parameters": {}}', []),
    (LLAMA3, '{"some": "json"}', '{"some": "json"}', []),
    (
        INTERNLM2,
        'ok<|action_start|><|plugin|>\n{"name": "f", "parameters": {"a": 1}}<|action_end|>\n',
        "ok",
        [("f", '{"a": 1}')],
    ),
]


def parsed(row, pieces):
    parser = ToolParser(row)
    found = [each for piece in pieces for each in parser.push(piece)] + parser.finish()
    calls = {}
    for each in found:
        if isinstance(each, CallPiece):
            name, arguments = calls.get(each.index, ("", ""))
            calls[each.index] = (name + (each.name or ""), arguments + each.arguments)
    assert list(calls) == list(range(len(calls))), "numbered as they come"
    return "".join(each for each in found if isinstance(each, str)), list(calls.values())


@pytest.mark.parametrize(("row", "answer", "content", "calls"), CASES)
def test_content_and_calls_however_the_answer_is_cut(row, answer, content, calls):
    assert parsed(row, [answer]) == (content, calls)
    assert parsed(row, answer) == (content, calls)
    for seed in range(30):
        draw, pieces, place = random.Random(seed), [], 0
        while place < len(answer):
            size = draw.choice([1, 1, 2, 3, 9, 30])
            pieces.append(answer[place : place + size])
            place += size
        assert parsed(row, pieces) == (content, calls), pieces


def test_a_call_is_told_before_it_is_whole():
    parser = ToolParser(HERMES)
    [head] = parser.push('<tool_call>\n{"name": "f", "arguments": {')[:1]
    assert (head.name, head.index, len(head.id)) == ("f", 0, 9)
    assert head.as_delta()["function"] == {"name": "f", "arguments": ""}
    [piece] = parser.push('"a": ')
    assert piece.as_delta() == {"index": 0, "function": {"arguments": '"a": '}}


def test_a_mark_without_an_end_is_not_held_back_for_ever():
    parser = ToolParser(HERMES)
    told = "".join(map(str, parser.push("<tool_call>" + "x" * 5000)))
    assert told.startswith("<tool_call>xxx")


@pytest.mark.parametrize("cut", ["", "\n<", "\n<tool_call>", '\n<tool_call>\n{"name": "g'])
def test_what_is_left_of_a_forced_call_that_was_cut_is_no_content(cut: str) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parser = ToolParser(HERMES, forced=True)
    pieces = [piece for letter in call + cut for piece in parser.push(letter)] + parser.finish()
    assert all(isinstance(piece, CallPiece) for piece in pieces)
    assert parser.calls == 1
