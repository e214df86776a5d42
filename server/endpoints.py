"""/v1/chat/completions and /v1/completions: validate, make ids, ask the engine, shape the answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.config import Grammar, Sampling
from server.answer_reader import AnswerReader
from server.answer_shapes import ChatShape, CompletionShape
from server.errors import RequestError
from server.generation import Arrival, Generation
from server.logprobs import LogprobQueue
from server.openai import ChatRequest, CompletionRequest
from server.openai import Request as Asked
from server.response_format import grammar_of
from server.shapes import RefusedField
from server.tool_formats import ToolFormat, tool_format, with_tools
from server.tool_grammar import call_grammar, free_grammar
from server.tool_parser import ToolParser

DEFAULT_COMPLETION_TOKENS = 16


class OpenAIEndpoints:
    """The two endpoints over one engine; `router` has them."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._row, self._native = tool_format(generation.tokenizer)
        self.router = APIRouter()
        self.router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        self.router.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)

    async def chat(self, request: Request, asked: ChatRequest) -> Response | dict[str, Any]:
        generation = self._generation
        generation.check_model(asked.model)
        with generation.let_in(request, asked.answers) as arrival:
            prompt_ids = await self._prompt(arrival, asked)
            calls = bool(asked.callable)

            def sampling(most: int, answer: int) -> Sampling:
                options = asked.sampling(most=most, answer=answer)
                # The marks of a call may be special tokens: skipped, nobody would see the call.
                marked = calls and self._row.special
                return dataclasses.replace(options, skip_special_tokens=False) if marked else options

            jobs = generation.jobs([prompt_ids], sampling, answers=asked.answers, limit=asked.limit, param="messages")
            grammar, param = self._grammar(asked)
            jobs = await generation.with_grammar(arrival, jobs, grammar, param=param)
            shape = ChatShape(
                generation.model,
                generation.tokenizer,
                self._reader(
                    asked, skip_special=jobs[0].sampling.skip_special_tokens, row=self._row if calls else None
                ),
                with_usage=_with_usage(asked),
            )
            return await generation.answer(
                arrival, jobs, shape, stream=bool(asked.stream), priority=asked.priority or 0
            )

    async def complete(self, request: Request, asked: CompletionRequest) -> Response | dict[str, Any]:
        generation = self._generation
        generation.check_model(asked.model)
        tokenizer, prompts = generation.tokenizer, asked.prompts
        sizes = [len(prompt) for prompt in prompts if isinstance(prompt, str)]

        def encode() -> list[list[int]]:
            return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

        with generation.let_in(request, len(prompts) * asked.answers) as arrival:
            longest = max(sizes, default=0)
            ids = await generation.made(arrival, encode, size=sum(sizes), longest=longest, param="prompt")
            jobs = generation.jobs(
                ids,
                lambda most, answer: asked.sampling(most=most, answer=answer),
                answers=asked.answers,
                limit=DEFAULT_COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens,
                param="prompt",
            )
            shape = CompletionShape(
                generation.model,
                tokenizer,
                self._reader(asked, skip_special=asked.skip_special_tokens is not False, row=None),
                with_usage=_with_usage(asked),
            )
            return await generation.answer(
                arrival, jobs, shape, stream=bool(asked.stream), priority=asked.priority or 0
            )

    async def _prompt(self, arrival: Arrival, asked: ChatRequest) -> list[int]:
        tokenizer = self._generation.tokenizer
        size = sum(message.size for message in asked.turns)
        if tokenizer.chat_template is None:
            if isinstance(asked.messages, str):
                text = asked.messages
                return await self._generation.made(arrival, lambda: tokenizer.encode(text), size=size, param="messages")
            raise RequestError(
                f"The model {self._generation.model.name!r} has no chat template: it completes text, at "
                "/v1/completions, or here with 'messages' as text.",
                param="messages",
                code="no_chat_template",
            )
        try:
            turns = [message.for_template() for message in asked.turns]
        except RefusedField as error:
            raise RequestError(str(error), param=error.param, code=error.code) from error
        tools = [tool.for_template() for tool in asked.tools or ()] if asked.tool_choice != "none" else []
        size += sum(len(json.dumps(tool)) for tool in tools)
        if not self._native:
            turns, told = with_tools(turns, tools, self._row), None
        else:
            told = tools or None
        return await self._generation.rendered(
            arrival, lambda: tokenizer.encode_chat(turns, tools=told), size=size, param="messages"
        )

    def _grammar(self, asked: ChatRequest) -> tuple[Grammar | None, str]:
        """What the answer must follow, and the field that says so."""
        try:
            if asked.must_call:
                many = asked.parallel_tool_calls is not False and not asked.names_function
                vocabulary = self._generation.tokenizer
                return call_grammar(asked.callable, self._row, vocabulary, many=many), "tools"
            if any(tool.function.strict for tool in asked.callable):
                return free_grammar(asked.callable, self._row), "tools"
            return grammar_of(asked.response_format), "response_format"
        except RefusedField as error:
            raise RequestError(str(error), param=error.param, code=error.code) from error

    def _reader(self, asked: Asked, *, skip_special: bool, row: ToolFormat | None) -> Callable[[], AnswerReader]:
        """Makes what reads one answer."""
        tokenizer = self._generation.tokenizer
        named = isinstance(asked, ChatRequest) and asked.names_function
        forced = isinstance(asked, ChatRequest) and asked.must_call

        def make() -> AnswerReader:
            wanted = asked.wanted_logprobs is not None
            return AnswerReader(
                logprobs=LogprobQueue(tokenizer, skip_special=skip_special) if wanted else None,
                parser=None if row is None else ToolParser(row, forced=forced),
                calls_end="stop" if named else "tool_calls",
            )

        return make


def _with_usage(asked: Asked) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage
