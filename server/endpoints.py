"""/v1/chat/completions and /v1/completions: validate, make ids, ask the engine, shape the answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from engine.runtime.client import EngineClient, EngineError
from engine.runtime.tokenizer import Tokenizer
from server.answers import Answers, Job
from server.config import ServedModel
from server.errors import RequestError, engine_error_body
from server.event_stream import DONE, ClientGone, EventStream, event_line, unless_gone
from server.openai import ChatRequest, CompletionRequest
from server.openai import Request as Asked

Made = TypeVar("Made")
LONG_TEXT = 2000
MOST_ANSWERS = 1024
DEFAULT_COMPLETION_TOKENS = 16


class Generation:
    """The two endpoints over one engine; `router` has them."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, model: ServedModel) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._model = model
        self.router = APIRouter()
        self.router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        self.router.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)

    async def chat(self, request: Request, asked: ChatRequest) -> Response | dict[str, Any]:
        self._check_model(asked.model)
        if self._tokenizer.chat_template is None:
            raise RequestError(
                f"The model {self._model.name!r} has no chat template: it completes text, at /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        messages = [message.for_template() for message in asked.messages]
        size = sum(len(message["content"]) for message in messages)
        prompt_ids = await self._made(lambda: self._tokenizer.encode_chat(messages), size=size, param="messages")
        jobs = self._jobs(asked, [prompt_ids], limit=asked.limit, param="messages")
        return await self._answer(request, asked, jobs, ChatShape(self._model, asked))

    async def complete(self, request: Request, asked: CompletionRequest) -> Response | dict[str, Any]:
        self._check_model(asked.model)
        prompts = asked.prompts
        size = sum(len(prompt) for prompt in prompts)
        ids = await self._made(lambda: [self._ids(prompt) for prompt in prompts], size=size, param="prompt")
        limit = DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        jobs = self._jobs(asked, ids, limit=limit, param="prompt")
        return await self._answer(request, asked, jobs, CompletionShape(self._model, asked))

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _check_model(self, name: str) -> None:
        if not self._model.answers_to(name):
            raise RequestError(
                f"The model {name!r} is not here; this server has {self._model.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def _made(self, make: Callable[[], Made], *, size: int, param: str) -> Made:
        """What `make` returns, in a thread for a long text: tokenizing must not hold up other answers."""
        try:
            return await anyio.to_thread.run_sync(make) if size > LONG_TEXT else make()
        except ValueError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error

    def _jobs(self, asked: Asked, prompts: Sequence[list[int]], *, limit: int | None, param: str) -> list[Job]:
        """A job for every prompt and answer, in OpenAI's order: all answers to the first prompt first."""
        session_len = self._client.session_len
        if len(prompts) * asked.answers > MOST_ANSWERS:
            raise RequestError(f"More than {MOST_ANSWERS} answers in one request.", param="n", code="invalid_value")
        jobs: list[Job] = []
        for number, prompt_ids in enumerate(prompts):
            if not prompt_ids:
                raise RequestError("The prompt is empty.", param=param, code="invalid_value")
            room = session_len - len(prompt_ids)
            if room < 1:
                raise RequestError(
                    f"The prompt has {len(prompt_ids)} tokens; prompt and answer together can have {session_len}.",
                    param=param,
                    code="context_length_exceeded",
                )
            for answer in range(asked.answers):
                sampling = asked.sampling(most=room if limit is None else min(limit, room), answer=answer)
                jobs.append(Job(prompt=number, prompt_ids=prompt_ids, sampling=sampling))
        return jobs

    async def _answer(
        self, request: Request, asked: Asked, jobs: list[Job], shape: ChatShape | CompletionShape
    ) -> Response | dict[str, Any]:
        try:
            answers = await unless_gone(request, Answers.open(self._client, jobs))
            if asked.stream:
                return EventStream(shape.lines(answers, len(jobs)), close=answers.close)
            try:
                texts = await unless_gone(request, answers.texts())
            finally:
                answers.close()
        except ValueError as error:
            raise RequestError(str(error), code="invalid_value") from error
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the number is nginx's for the log
        return shape.whole(texts, answers)


class ChatShape:
    """Answers as chat completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel, asked: Asked) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._with_usage = asked.stream_options is not None and asked.stream_options.include_usage

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What is sent of an answer before its first token."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, texts: Sequence[tuple[str, str | None]], answers: Answers) -> dict[str, Any]:
        choices = [self.choice(index, text, reason) for index, (text, reason) in enumerate(texts)]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": answers.usage()}

    async def lines(self, answers: Answers, count: int) -> AsyncGenerator[str, None]:
        """The lines of the stream. Text and finish reason come in chunks of their own, as OpenAI sends them."""
        try:
            for index in range(count):
                if opening := self.opening(index):
                    yield self._line([opening])
            async with aclosing(answers.events()) as events:
                async for index, event in events:
                    if event.text:
                        yield self._line([self.piece(index, event.text, None)])
                    if event.finish_reason:
                        yield self._line([self.piece(index, "", event.finish_reason)])
            if self._with_usage:
                yield self._line([], usage=answers.usage())
            yield DONE
        except EngineError:
            yield event_line(engine_error_body())

    def _line(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        tail = {"usage": usage} if self._with_usage else {}
        return event_line({**self._head, "object": self.chunk_kind, "choices": choices, **tail})


class CompletionShape(ChatShape):
    """Answers as text completions: the same, with `text` for messages and deltas."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self.choice(index, text, finish_reason)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None
