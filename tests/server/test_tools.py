"""Calls of tools, through the official client. The model here is random: what it must do, its grammar makes it do."""

import json

import jsonschema
import openai
import pydantic
import pytest

HELLO = [{"role": "user", "content": "the cat sat"}]
PLACE = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"type": "string", "maxLength": 6},
    },
    "required": ["city", "days"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": PLACE}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def asked(wide, **options):
    defaults = {"temperature": 1.2, "seed": 3, "max_tokens": 300, "tools": [WEATHER, CLOCK]}
    return wide.chat.completions.create(**{"model": "tiny", "messages": HELLO, **defaults, **options})


def check(calls):
    for call in calls:
        arguments = json.loads(call.function.arguments)
        assert call.type == "function"
        assert call.id
        jsonschema.validate(arguments, {"weather": PLACE, "clock": {"type": "object"}}[call.function.name])
    assert len({call.id for call in calls}) == len(calls)


def test_a_required_call_is_made_and_its_arguments_validate(wide: openai.OpenAI) -> None:
    for choice in asked(wide, tool_choice="required", n=8, parallel_tool_calls=False).choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(choice.message.tool_calls) == 1
        check(choice.message.tool_calls)


def test_calls_can_be_several(wide: openai.OpenAI) -> None:
    # A blank between calls is likelier than the end for some seeds; the bias on the end token makes it so for all.
    answers = asked(wide, tool_choice="required", n=8, logit_bias={"1": -6}, max_tokens=250).choices
    found = [len(choice.message.tool_calls) for choice in answers]
    assert max(found) > 1
    for choice in answers:
        check(choice.message.tool_calls if choice.finish_reason == "tool_calls" else choice.message.tool_calls[:-1])


def test_a_named_call_is_that_one(wide: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in asked(wide, tool_choice=named, n=3).choices:
        assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
        assert choice.finish_reason == "stop", "as OpenAI says where the function was named"
        check(choice.message.tool_calls)


def test_a_stream_brings_the_same_call_in_pieces(wide: openai.OpenAI) -> None:
    whole = asked(wide, tool_choice="required").choices[0].message.tool_calls
    names, arguments, ids, reason, pieces = {}, {}, {}, None, 0
    for chunk in asked(wide, tool_choice="required", stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            assert not choice.delta.content
            for piece in choice.delta.tool_calls or ():
                pieces += 1
                names.setdefault(piece.index, piece.function.name)
                ids.setdefault(piece.index, piece.id)
                arguments[piece.index] = arguments.get(piece.index, "") + piece.function.arguments
    assert [(names[i], arguments[i]) for i in sorted(names)] == [(c.function.name, c.function.arguments) for c in whole]
    assert all(ids.values())
    assert reason == "tool_calls"
    assert pieces > 2 * len(names), "the arguments come while they are written"


class Look(openai.BaseModel):
    """Look somewhere."""

    where: int = pydantic.Field(ge=0, le=99)


def test_the_client_puts_a_streamed_call_together(wide: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Look)
    with wide.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[tool], tool_choice="required", temperature=1.0, seed=1, max_tokens=200
    ) as stream:
        answer = stream.get_final_completion()
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Look)


def test_no_call_where_none_is_wanted(wide: openai.OpenAI) -> None:
    plain = asked(wide, tools=openai.omit, temperature=0, max_tokens=20).choices[0]
    for options in ({"tool_choice": "none"}, {"tools": []}):
        choice = asked(wide, temperature=0, max_tokens=20, **options).choices[0]
        assert choice.message.tool_calls is None
        assert choice.message.content == plain.message.content, "the model is not told of the tools"


def test_a_free_answer_may_be_text(wide: openai.OpenAI) -> None:
    for strict in (False, True):
        tool = {"type": "function", "function": {**WEATHER["function"], "strict": strict}}
        choice = asked(wide, tools=[tool], tool_choice="auto", temperature=0, max_tokens=20).choices[0]
        assert choice.message.content
        assert choice.message.tool_calls is None


def test_results_of_calls_go_back_to_the_model(wide: openai.OpenAI) -> None:
    message = asked(wide, tool_choice="required", parallel_tool_calls=False).choices[0].message
    call = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    talk = [*HELLO, message.model_dump(exclude_none=True), result]
    with_result = asked(wide, messages=talk, max_tokens=5)
    without = asked(wide, messages=HELLO, max_tokens=5)
    assert with_result.usage.prompt_tokens > without.usage.prompt_tokens + len("sunny")
    assert asked(wide, messages=[*talk[:2], {**result, "content": [{"type": "text", "text": "sunny"}]}], max_tokens=5)


def test_arguments_that_cannot_be_enforced_are_named(wide: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        asked(wide, tools=[tool], tool_choice="required")
    assert caught.value.param == "tools.f.parameters"
    assert asked(wide, tools=[tool], max_tokens=2), "a free answer needs no grammar"
