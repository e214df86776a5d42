import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.server.running import KEY, Served

HELLO = [{"role": "user", "content": "the cat sat"}]
FUNCTION = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
HEADERS = {"Authorization": f"Bearer {KEY}"}


def schema_of(schema: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def called(arguments: str) -> dict[str, object]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": arguments}}


def test_models(api: openai.OpenAI, served: Served) -> None:
    [model] = api.models.list()
    assert model.id == "tiny"
    assert model.artifact_id == served.artifact_id
    assert (model.recipe, model.verdict, model.waiver, model.session_len) == ("fp16", "pass", None, 128)
    for name in ("tiny", served.artifact_id, served.artifact_id[:12]):
        assert api.models.retrieve(name).id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("../secret")
    assert caught.value.code == "model_not_found"


def test_chat_whole_and_streamed_are_one_text(api: openai.OpenAI, served: Served) -> None:
    whole = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, **GREEDY)
    prompt_tokens = len(served.tokenizer.encode_chat(HELLO))
    assert whole.object == "chat.completion"
    assert whole.system_fingerprint == f"{served.artifact_id[:12]}-fp16-pass"
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt_tokens, 30)
    assert whole.usage.total_tokens == prompt_tokens + 30

    chunks = list(
        api.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_completion_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same prompt came before
    assert all(chunk.id == chunks[0].id and chunk.created and chunk.model == "tiny" for chunk in chunks)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.system_fingerprint for chunk in chunks} == {f"{served.artifact_id[:12]}-fp16-pass"}


def test_the_stream_on_the_wire(served: Served) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True, "temperature": 0, "ignore_eos": True}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "usage" not in chunks[0]
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


def test_content_parts_and_developer_messages(api: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "the cat "}, {"type": "text", "text": "sat"}]
    messages = [
        [{"role": "system", "content": "be kind"}, *HELLO],
        [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}],
    ]
    answers = [
        api.chat.completions.create(model="tiny", messages=each, max_tokens=8, **GREEDY).choices[0].message.content
        for each in messages
    ]
    assert answers[0] == answers[1]


def test_an_answer_can_be_sent_back_as_the_client_returns_it(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, **GREEDY).choices[0].message
    messages = [*HELLO, answer.model_dump(), {"role": "user", "content": "and then"}]
    assert api.chat.completions.create(model="tiny", messages=messages, max_tokens=4, **GREEDY).usage


def test_completions_of_texts_and_ids(api: openai.OpenAI, served: Served) -> None:
    one = api.completions.create(model="tiny", prompt="the cat", **GREEDY)
    assert one.object == "text_completion"
    assert one.usage.completion_tokens == 16
    ids = served.tokenizer.encode("the cat")
    for prompt in (ids, [ids], ["the cat"]):
        assert api.completions.create(model="tiny", prompt=prompt, **GREEDY).choices[0].text == one.choices[0].text
    many = api.completions.create(model="tiny", prompt=["the dog", "the cat"], **GREEDY)
    assert [choice.index for choice in many.choices] == [0, 1]
    assert many.choices[1].text == one.choices[0].text


def test_streams_of_several_answers_are_told_apart(api: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": ["the dog", "the cat"], "n": 2, "seed": 7, "max_tokens": 12}
    extra = {"ignore_eos": True}
    whole = api.completions.create(**asked, extra_body=extra)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text != whole.choices[1].text
    prompt_tokens = whole.usage.prompt_tokens
    assert whole.usage.completion_tokens == 48
    texts = [""] * 4
    options = {"include_usage": True}
    for chunk in api.completions.create(**asked, stream=True, stream_options=options, extra_body=extra):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage
    assert texts == [choice.text for choice in whole.choices]
    assert usage.prompt_tokens == prompt_tokens


def test_a_seed_repeats_an_answer_and_none_does_not(api: openai.OpenAI) -> None:
    def text(**options: object) -> str:
        answer = api.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=20, extra_body={"ignore_eos": True}, **options
        )
        return answer.choices[0].message.content

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text() != text()


def test_stop_strings_are_not_part_of_the_answer(api: openai.OpenAI) -> None:
    whole = api.completions.create(model="tiny", prompt="the cat", max_tokens=30, **GREEDY).choices[0].text
    stop = whole[10:13]
    answer = api.completions.create(model="tiny", prompt="the cat", max_tokens=30, stop=["zzzz", stop], **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_ends_with_the_session(api: openai.OpenAI, served: Served) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert answer.usage.total_tokens == 128
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"n": 0}, "n", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": -1}, "top_p", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "unsupported_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "assistant", "content": "I first"}]}, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "cat " * 400}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "lone \ud800"}]}, None, None),
        ({"stream_options": {"include_usage": True}}, "stream_options", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools", "invalid_value"),
        ({"tools": [FUNCTION] * 129}, "tools", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "invalid_value"),
        ({"tools": [FUNCTION], "response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "unsupported_value"),
        ({"response_format": {"type": "nonsense"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "regex", "regex": "(?=a)a"}}, "response_format.regex", "invalid_value"),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "grammar", "grammar": "root ::= x"}}, "response_format", "invalid_value"),
        (schema_of({"not": {}}), "response_format.json_schema.schema", "invalid_json_schema"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "invalid_value"),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [called("[1]")]}]},
            "messages",
            "invalid_value",
        ),
        ({"stop": True}, "stop", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"five": 1}}, None, "invalid_value"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9999": 1}}, None, "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "unsupported_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"session_id": 5}, "session_id", "unsupported_parameter"),
        ({"wibble": 1}, "wibble", "unknown_parameter"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    served: Served, change: dict[str, object], param: str | None, code: str | None
) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1, **change})
    headers = {**HEADERS, "Content-Type": "application/json"}
    if "max_completion_tokens" in change:
        assert "max_tokens" in change
    response = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param:
        assert (error["param"], error["code"]) == (param, code)


def test_neutral_values_are_accepted(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=1,
        n=1,
        logprobs=False,
        stop=None,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        user="somebody",
        extra_body={"top_k": 5, "repetition_penalty": 1.1},
    )
    assert answer.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"prompt": []}, "invalid_value"),
        ({"prompt": [[]]}, "invalid_value"),
        ({"prompt": [99999]}, "invalid_value"),
        ({"prompt": [-1]}, "invalid_value"),
        ({"prompt": [1] * 128}, "context_length_exceeded"),
        ({"prompt": ["a"] * 500, "n": 3}, "invalid_value"),
        ({"logprobs": 21}, "invalid_value"),
        ({"logprobs": True}, "invalid_value"),
        ({"echo": True}, "unsupported_parameter"),
        ({"suffix": "x"}, "unsupported_parameter"),
        ({"best_of": 2}, "unsupported_parameter"),
    ],
)
def test_completions_that_are_refused(api: openai.OpenAI, change: dict[str, object], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(**{"model": "tiny", "prompt": "x", **change})
    assert caught.value.code == code


def test_an_unknown_model_is_404(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert "'tiny'" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_request(served: Served, stream: bool) -> None:
    assert served.unfinished() == 0
    body = json.dumps(
        {"model": "tiny", "prompt": ["the"] * 8, "n": 8, "max_tokens": 120, "ignore_eos": True, "stream": stream}
    )
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: served.unfinished() > 0)
    wait_until(lambda: served.unfinished() == 0)


def wait_until(holds: object) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
