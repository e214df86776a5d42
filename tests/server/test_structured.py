"""Answers that follow a format, through the official client."""

import json
import re

import jsonschema
import openai
import pydantic
import pytest

from tests.server.running import Served

HELLO = [{"role": "user", "content": "the cat sat"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def asked(wide, response_format, **options):
    # The byte that ends a string is one of 300 tokens, so an unbounded one would go on.
    options = {"temperature": 1.5, "seed": 1, "max_tokens": 400} | options
    return wide.chat.completions.create(model="tiny", messages=HELLO, response_format=response_format, **options)


def of_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


def test_a_schema_is_followed_by_each_of_several_answers_and_in_a_stream(wide: openai.OpenAI) -> None:
    whole = asked(wide, of_schema(SCHEMA), n=4)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    streamed = [""] * 4
    for chunk in asked(wide, of_schema(SCHEMA), n=4, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


class Person(pydantic.BaseModel):
    kind: str = pydantic.Field(pattern="^[a-z]{1,5}$")
    age: int = pydantic.Field(ge=0, le=99)
    friends: list["Person"] = pydantic.Field(max_length=1)


def test_the_client_parses_its_own_models(wide: openai.OpenAI) -> None:
    answer = wide.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Person, temperature=1.0, seed=2, max_tokens=1500
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_json_mode_is_an_object(wide: openai.OpenAI, roomy: Served) -> None:
    # The model is random: the bias lets it come to the end of a string and of the object.
    closing = {str(roomy.tokenizer.token_id(character)): 4 for character in '"}'}
    choices = asked(wide, {"type": "json_object"}, n=8, max_tokens=150, logit_bias=closing).choices
    found = [json.loads(choice.message.content) for choice in choices if choice.finish_reason == "stop"]
    assert found, "not one was finished"
    assert all(isinstance(each, dict) for each in found)


def test_a_regex_is_matched_as_a_whole(wide: openai.OpenAI) -> None:
    pattern = r"(cat|dog): [0-9]{3}-[a-f]+\."
    choice = asked(wide, {"type": "regex", "regex": pattern}).choices[0]
    assert re.fullmatch(pattern, choice.message.content)


def test_a_grammar_is_followed(wide: openai.OpenAI) -> None:
    grammar = 'root ::= term ("+" term){1,3}\nterm ::= [0-9] | "(" [0-9] "*" [0-9] ")"'
    choice = asked(wide, {"type": "grammar", "grammar": grammar}).choices[0]
    assert re.fullmatch(r"[0-9(][0-9+*()]*", choice.message.content)
    assert isinstance(eval(choice.message.content, {"__builtins__": {}}), int)  # noqa: S307 (digits, + and * alone)


def test_a_text_format_asks_for_nothing(wide: openai.OpenAI) -> None:
    assert asked(wide, {"type": "text"}, max_tokens=3).usage.completion_tokens


def test_too_large_a_grammar_is_refused_and_the_server_lives(wide: openai.OpenAI, roomy: Served) -> None:
    nested = "a"
    for _ in range(5):
        nested = f"({nested}|b){{1,400}}"
    before = roomy.unfinished()
    with pytest.raises(openai.BadRequestError):
        asked(wide, {"type": "regex", "regex": "(" * 3000})
    try:
        asked(wide, {"type": "regex", "regex": nested}, max_tokens=4)
    except openai.BadRequestError as error:
        assert "too large" in error.message
    assert asked(wide, {"type": "regex", "regex": "[a-c]"}).choices[0].message.content in "abc"
    assert roomy.unfinished() == before
