"""Bodies that are all wrong are refused by their first error: a server that listed a million would answer nobody else
meanwhile."""

import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from server.config import AppConfig, ServedModel
from server.errors import validation_body
from server.interactive import InteractiveRequest
from server.openai import ChatRequest, CompletionRequest
from server.tokenization import DetokenizeRequest, EncodeRequest
from tests.server.running import HEADERS, Served
from tests.server.test_app import ask

MANY = 200_000
MESSAGE = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
TOOL = {"type": "function", "function": {"name": "f"}}
KEYS = {f"k{number}": 1 for number in range(MANY)}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
ROWS: list[tuple[str, type[BaseModel], dict[str, Any]]] = [
    ("ids", CompletionRequest, {"prompt": [1] * (1 << 21)}),
    ("a wrong id at the end", CompletionRequest, {"prompt": [1] * MANY + ["a"]}),
    ("wrong ids", CompletionRequest, {"prompt": [0.5] * MANY}),
    ("truths", CompletionRequest, {"prompt": [True] * MANY}),
    ("lists of nothing", CompletionRequest, {"prompt": [[]] * (1 << 21)}),
    ("lists of wrong ids", CompletionRequest, {"prompt": [["a"]] * MANY}),
    ("stops", CompletionRequest, {"prompt": "a", "stop": ["a"] * MANY}),
    ("wrong stops", CompletionRequest, {"prompt": "a", "stop": [1] * MANY}),
    ("stop ids", CompletionRequest, {"prompt": "a", "stop_token_ids": [-1] * MANY}),
    ("biases", CompletionRequest, {"prompt": "a", "logit_bias": KEYS}),
    ("unknown fields", CompletionRequest, {"prompt": "a", **KEYS}),
    ("messages", ChatRequest, {"messages": [MESSAGE] * MANY}),
    ("fields of a message", ChatRequest, {"messages": [{**MESSAGE, **KEYS}]}),
    ("parts", ChatRequest, {"messages": [{"role": "user", "content": [PART] * MANY}]}),
    ("parts of many messages", ChatRequest, {"messages": [{"role": "user", "content": [PART] * 50}] * 4000}),
    ("calls", ChatRequest, {"messages": [{"role": "assistant", "content": "a", "tool_calls": [CALL] * MANY}]}),
    ("tools", ChatRequest, {"messages": [MESSAGE], "tools": [TOOL] * MANY}),
    ("metadata", ChatRequest, {"messages": [MESSAGE], "metadata": KEYS}),
    ("a prompt of messages", InteractiveRequest, {"prompt": [MESSAGE] * MANY}),
    ("wrong tokens", DetokenizeRequest, {"tokens": ["a"] * MANY}),
    ("texts", EncodeRequest, {"input": ["a"] * MANY}),
]


@pytest.mark.parametrize(("shape", "body"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_few_errors_are_told_of_many(shape: type[BaseModel], body: dict[str, Any]) -> None:
    named = {"model": "tiny", **body} if "model" in shape.model_fields and shape is not DetokenizeRequest else body
    with pytest.raises(ValidationError) as caught:
        shape.model_validate(named)
    errors = caught.value.errors()
    assert len(errors) < 10
    assert len(json.dumps(validation_body(errors))) < 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "The body is missing: send an object of JSON."),
        ("null", "The body must be an object of JSON."),
        ("{", "The body is not valid JSON: it must be one object, in UTF-8, and not deeply nested."),
        ("[" * 100_000, "The body is not valid JSON: it must be one object, in UTF-8, and not deeply nested."),
        (b'{"model": "\xff"}', "The body is not valid JSON: it must be one object, in UTF-8, and not deeply nested."),
        (
            '{"model": "tiny", "messages": "a", "response_format": {"type": "regex"}}',
            "The field 'response_format.regex' is missing.",
        ),
        ('{"model": "tiny", "messages": "a", "stop": 5}', "stop: It must be a string, or a list of up to 16 of them."),
        ('{"model": "tiny", "messages": "a", "stop": [5]}', "stop[0]: Input should be a valid string."),
        (
            '{"model": "tiny", "messages": "a", "logit_bias": {"9999999": 1}}',
            "logit_bias has the token id 9999999, but must be ids from 0 to",
        ),
        ('{"model": "tiny", "messages": []}', "messages: Value should have at least 1 item"),
        ('{"model": "tiny", "messages": 5}', "messages: It must be a list of messages, or text."),
    ],
)
def test_what_is_wrong_is_said_of_what_was_meant(served: Served, body: str | bytes, message: str) -> None:
    headers = {**HEADERS, "Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("prompt", ["a", ["a", ""], [1, 2], [[1], [2, 3]], [[]]])
def test_prompts_are_of_four_kinds(prompt: Any) -> None:
    assert CompletionRequest(model="tiny", prompt=prompt).prompt == prompt
    for wrong in ([], None, 5, ["a", 1], [1, [1]], [-1], [2**31], [[2**31]], [[True]], {"a": 1}):
        with pytest.raises(ValidationError, match="It must be text, a list of texts"):
            CompletionRequest(model="tiny", prompt=wrong)


def test_a_client_that_sends_all_of_a_giant_body_first_gets_the_answer(served: Served) -> None:
    """Closed over what it still sends, the connection would be reset, and the answer lost."""
    for _ in range(3):
        answer = httpx.post(f"{served.url}/v1/completions", content=b" " * (20 << 20), headers=HEADERS, timeout=60)
        assert (answer.status_code, answer.headers["connection"]) == (413, "close")
        assert answer.json()["error"]["code"] == "body_too_large"


def test_the_schema_still_says_what_a_prompt_may_be(tiny_folder) -> None:  # type: ignore[no-untyped-def]
    schema = ask(tiny_folder, "GET", "/openapi.json", config=AppConfig(model=ServedModel(name="tiny"))).json()
    prompt = schema["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert {"type": "string"} in prompt["anyOf"]
