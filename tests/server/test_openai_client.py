"""The official client, synchronous and asynchronous: each case is asked both ways, and answered alike.

With the other files here that use it (endpoints, structured answers, tools, log-probabilities) these are the cases of
"clients that people already have work".
"""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.running import KEY, Served

Ask = Callable[..., Any]
HELLO = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, served: Served) -> Ask:
    """Calls `client.PATH.create(**options)` and returns the answer, or all chunks of a stream."""
    address = {"base_url": f"{served.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60}

    def resource(client: Any, path: str) -> Any:
        for name in path.split("."):
            client = getattr(client, name)
        return client

    def sync(path: str, **options: Any) -> Any:
        with openai.OpenAI(**address) as client:
            answer = resource(client, path)(**options)
            return list(answer) if options.get("stream") or path.endswith("list") else answer

    async def asynchronous(path: str, **options: Any) -> Any:
        async with openai.AsyncOpenAI(**address) as client:
            answer = resource(client, path)(**options)
            if path.endswith("list"):
                return [each async for each in answer]
            answer = await answer
            return [chunk async for chunk in answer] if options.get("stream") else answer

    return sync if request.param == "sync" else lambda path, **options: asyncio.run(asynchronous(path, **options))


def chat(ask: Ask, **options: Any) -> Any:
    return ask("chat.completions.create", **{"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 1, **options})


def complete(ask: Ask, **options: Any) -> Any:
    return ask("completions.create", **{"model": "tiny", "prompt": "the cat", "max_tokens": 8, "seed": 1, **options})


def text_of(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_models(ask: Ask, served: Served) -> None:
    [model] = ask("models.list")
    assert ask("models.retrieve", model="tiny") == model
    assert (model.artifact_id, model.recipe, model.verdict) == (served.artifact_id, "fp16", "pass")


def test_chat(ask: Ask) -> None:
    answer = chat(ask, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.7, "top_p": 0.9},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {"70": 5.0, "71": -100.0}},
        {"stop": ["t", "zz"]},
        {"extra_body": {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.2}},
        {"extra_body": {"ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": [80]}},
        {"response_format": {"type": "regex", "regex": "[a-z]{3,9}"}},
        {"n": 3},
    ],
    ids=lambda options: next(iter(options.get("extra_body", options))),
)
def test_a_stream_is_the_same_answer_in_pieces(ask: Ask, options: dict[str, Any]) -> None:
    whole = chat(ask, **options)
    pieces = [""] * len(whole.choices)
    reasons: list[str | None] = [None] * len(whole.choices)
    for chunk in chat(ask, stream=True, **options):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert pieces == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_usage_at_the_end_of_a_stream(ask: Ask) -> None:
    chunks = chat(ask, stream=True, stream_options={"include_usage": True})
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    whole = chat(ask).usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
        whole.prompt_tokens,
        whole.completion_tokens,
    )


def test_cached_tokens_are_told(ask: Ask) -> None:
    long = [{"role": "user", "content": "the dog ran to the cat " * 6}]
    chat(ask, messages=long)
    assert chat(ask, messages=long).usage.prompt_tokens_details.cached_tokens >= 16


def test_a_conversation(ask: Ask) -> None:
    first = chat(ask, temperature=0).choices[0].message
    talk = [{"role": "system", "content": "be kind"}, *HELLO, first.model_dump(), {"role": "user", "content": "and"}]
    assert chat(ask, messages=talk, temperature=0).usage.prompt_tokens > chat(ask).usage.prompt_tokens


@pytest.mark.parametrize("prompt", ["the cat", ["the cat", "the dog"], [70, 71], [[70, 71], [72]]], ids=str)
def test_completions(ask: Ask, prompt: Any) -> None:
    whole = complete(ask, prompt=prompt, extra_body={"ignore_eos": True})
    pieces = [""] * len(whole.choices)
    for chunk in complete(ask, prompt=prompt, stream=True, extra_body={"ignore_eos": True}):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == [choice.text for choice in whole.choices]
    assert whole.usage.completion_tokens == 8 * len(whole.choices)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"model": "other"}, openai.NotFoundError),
        ({"max_tokens": 0}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"stop": ["x"] * 17}, openai.BadRequestError),
        ({"response_format": {"type": "regex", "regex": "("}}, openai.BadRequestError),
        ({"extra_body": {"unknown": 1}}, openai.BadRequestError),
    ],
    ids=lambda each: str(each)[:24],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(ask: Ask, options: dict[str, Any], kind: type[Exception], stream: bool) -> None:
    with pytest.raises(kind) as caught:
        chat(ask, stream=stream, **options)
    assert caught.value.body["message"]


def test_a_wrong_key(served: Served) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_many_at_once_do_not_mix(served: Served) -> None:
    async def all_at_once() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=HELLO, max_tokens=12, seed=seed, stream=True
                )
                return text_of([chunk async for chunk in stream])

            alone = [await one(seed) for seed in range(12)]
            return alone, list(await asyncio.gather(*(one(seed) for seed in range(12))))

    alone, together = asyncio.run(all_at_once())
    assert together == alone


def test_leaving_a_stream_frees_the_request(served: Served) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=60) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            await stream.close()
            for _ in range(200):
                if await asyncio.to_thread(served.unfinished) == 0:
                    return
                await asyncio.sleep(0.02)
            raise AssertionError("the request runs on")

    asyncio.run(leave())
