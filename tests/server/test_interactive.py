"""LMDeploy's own surface: its chat with sessions, its encoder, and its chat request body."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from starlette.responses import StreamingResponse

from tests.server.running import HEADERS, Served

GREEDY = {"top_k": 1, "ignore_eos": True, "request_output_len": 6}


def post(served: Served, path: str, **body: object) -> httpx.Response:
    return httpx.post(served.url + path, json=body, headers=HEADERS, timeout=60)


def chat(served: Served, **body: object) -> dict[str, object]:
    response = post(served, "/v1/chat/interactive", **{**GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_one_question_is_the_chats_answer(served: Served) -> None:
    answer = chat(served, prompt="the cat")
    assert (answer["tokens"], answer["finish_reason"], answer["history_tokens"]) == (6, "length", 0)
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    same = post(served, "/v1/chat/completions", model="tiny", **body).json()
    assert answer["text"] == same["choices"][0]["message"]["content"]
    assert post(served, "/generate", prompt="the cat", **GREEDY).json()["text"] == answer["text"]


def test_a_session_goes_on_and_ends(served: Served) -> None:
    session = {"session_id": 5, "interactive_mode": True, "request_output_len": 3}
    first = chat(served, prompt="the cat", **session)
    second = chat(served, prompt="the dog", **session)
    assert second["history_tokens"] == first["input_tokens"] + 3
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "the dog"},
    ]
    assert chat(served, prompt=messages, request_output_len=3)["text"] == second["text"]
    assert chat(served, prompt="", **{**session, "interactive_mode": False, "request_output_len": 0})["tokens"] == 0
    assert chat(served, prompt="the dog", **session)["history_tokens"] == 0
    assert chat(served, prompt="the dog", renew_session=True, **session)["history_tokens"] == 0
    assert chat(served, prompt="the dog", session_id=5, end=True)["history_tokens"] > 0
    assert chat(served, prompt="the dog", session_id=5)["history_tokens"] == 0


def test_a_prompt_can_be_taken_in_without_an_answer(served: Served) -> None:
    session = {"session_id": 6, "interactive_mode": True}
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert chat(served, prompt=said, **{**session, "request_output_len": 0})["text"] == ""
    answer = chat(served, prompt="and", **session)
    assert answer["text"] == chat(served, prompt=[*said, {"role": "user", "content": "and"}])["text"]


def test_what_is_taken_in_has_the_sessions_room(served: Served) -> None:
    session = {"session_id": 9, "interactive_mode": True, "request_output_len": 0}
    assert chat(served, prompt="cat " * 30, **session)["input_tokens"] > 20
    refused = post(served, "/v1/chat/interactive", prompt="cat " * 120, **session)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert chat(served, prompt="x", session_id=9, request_output_len=1)["history_tokens"] > 20


def test_a_stream_is_lines_of_json(served: Served) -> None:
    whole = chat(served, prompt="the cat")
    with httpx.stream(
        "POST",
        f"{served.url}/v1/chat/interactive",
        json={"prompt": "the cat", "stream": True, **GREEDY},
        headers=HEADERS,
    ) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    assert "".join(line["text"] for line in lines) == whole["text"]
    assert [line["finish_reason"] for line in lines] == [None] * (len(lines) - 1) + ["length"]
    assert lines[-1]["tokens"] == 6


def test_who_has_read_the_last_line_may_ask_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def then_busy_elsewhere(*arguments: Any) -> None:
        await sent(*arguments)
        await asyncio.sleep(0.3)

    sent = StreamingResponse.__call__
    monkeypatch.setattr(StreamingResponse, "__call__", then_busy_elsewhere)
    asked = {"prompt": "the cat", "session_id": 8, "stream": True, **GREEDY}
    for _ in range(2):
        assert post(served, "/v1/chat/interactive", **asked).status_code == 200


def test_a_round_can_be_stopped_and_what_was_said_is_kept(roomy: Served) -> None:
    # Long enough that the stop comes before its end; half the session, so that what is kept leaves room for more.
    body = {"prompt": "the cat", "session_id": 7, "interactive_mode": True, "stream": True, "top_k": 1}
    body |= {"ignore_eos": True, "request_output_len": 1000}
    lines: list[dict[str, object]] = []
    begun = threading.Event()

    def listen() -> None:
        with httpx.stream(
            "POST", f"{roomy.url}/v1/chat/interactive", json=body, headers=HEADERS, timeout=60
        ) as response:
            for line in response.iter_lines():
                lines.append(json.loads(line))
                begun.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert begun.wait(30)
    busy = post(roomy, "/v1/chat/interactive", prompt="x", session_id=7, interactive_mode=True)
    chat(roomy, session_id=7, stop=True)
    listener.join(30)
    assert busy.status_code == 409
    assert lines[-1]["finish_reason"] == "stop"
    assert lines[-1]["tokens"] < 1000
    assert chat(roomy, prompt="x", session_id=7, request_output_len=1)["history_tokens"] > 0
    assert roomy.unfinished() == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"session_id": 99, "stop": True}, 404, "session_id"),
        ({"stop": True}, 400, "session_id"),
        ({"prompt": "x", "interactive_mode": True}, 400, "session_id"),
        ({"prompt": "x", "messages": "y"}, 400, "messages"),
        ({"prompt": "x", "session_id": 1, "interactive_mode": True, "end": True}, 400, "end"),
        ({"prompt": "cat " * 200}, 400, "prompt"),
        ({"prompt": "x", "wibble": 1}, 400, "wibble"),
        ({"prompt": "x", "top_p": 2}, 400, "top_p"),
    ],
)
def test_what_cannot_be_done_is_said(served: Served, body: dict[str, object], status: int, param: str) -> None:
    response = post(served, "/v1/chat/interactive", **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_round_that_cannot_be_leaves_the_session_as_it_was(served: Served) -> None:
    session = {"session_id": 8, "interactive_mode": True}
    first = chat(served, prompt="the cat", **session)
    assert post(served, "/v1/chat/interactive", prompt="cat " * 200, **session).status_code == 400
    assert chat(served, prompt="x", **session)["history_tokens"] == first["input_tokens"] + 6


def test_lmdeploys_chat_body(served: Served) -> None:
    """The body of its documentation: messages as text, stop as a switch, a field of its sessions."""
    body = {
        "model": "tiny",
        "messages": "the cat sat",
        "temperature": 0.7,
        "top_p": 1,
        "n": 1,
        "max_tokens": 512,
        "stop": False,
        "stream": False,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "string",
        "repetition_penalty": 1,
        "renew_session": False,
        "ignore_eos": False,
    }
    answer = post(served, "/v1/chat/completions", **body, seed=1).json()
    body |= {"messages": [{"role": "user", "content": "the cat sat"}], "stop": None}
    same = post(served, "/v1/chat/completions", **body, seed=1).json()
    assert answer["choices"] == same["choices"]
    assert answer["usage"]["prompt_tokens"] == len(served.tokenizer.encode_chat(body["messages"]))


def test_encode(served: Served) -> None:
    one = post(served, "/v1/encode", input="the cat").json()
    assert one["input_ids"] == served.tokenizer.encode("the cat")
    assert one["length"] == len(one["input_ids"])
    bare = post(served, "/v1/encode", input="the cat", add_bos=False).json()
    assert one["input_ids"] == [0, *bare["input_ids"]]
    many = post(served, "/v1/encode", input=["the cat", "a"]).json()
    assert many["input_ids"][0] == one["input_ids"]
    assert many["length"][1] == len(many["input_ids"][1])
    chat = post(served, "/v1/encode", input="a", do_preprocess=True).json()
    assert chat["input_ids"] == served.tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_tokenize_and_detokenize(served: Served) -> None:
    text = "the cat sat é"
    found = post(served, "/tokenize", model="tiny", prompt=text).json()
    assert found["tokens"] == served.tokenizer.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 128)
    assert post(served, "/detokenize", tokens=found["tokens"], skip_special_tokens=True).json() == {"prompt": text}
    assert post(served, "/detokenize", tokens=found["tokens"]).json() == {"prompt": "<s>" + text}
    messages = [{"role": "user", "content": "a"}]
    chat = post(served, "/tokenize", messages=messages, add_generation_prompt=False).json()
    assert chat["tokens"] == served.tokenizer.encode_chat(messages, add_generation_prompt=False)
    for wrong in ({}, {"prompt": "a", "messages": messages}, {"prompt": "a", "model": "other"}):
        assert post(served, "/tokenize", **wrong).status_code in (400, 404)
