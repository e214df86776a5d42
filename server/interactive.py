"""LMDeploy's own chat: /v1/chat/interactive, where the server keeps the conversation, and its older name /generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from engine.config import Sampling
from engine.runtime.client import EngineError
from engine.runtime.sequence import LEAST_PENALTY
from server.answers import Answers, Job
from server.conversations import Conversation, Conversations
from server.errors import RequestError, engine_error_body
from server.event_stream import LineStream, unless_gone
from server.generation import Arrival, Generation
from server.guard import owner_of
from server.messages import Messages
from server.openai import LARGEST_SEED
from server.shapes import RefusedField, Shape


class InteractiveRequest(Shape):
    """One round of a session, or a wish about one. The defaults are LMDeploy v0.1.0's.

    `session_id` -1 is a session of its own. With `interactive_mode` the session is kept after the round, without it
    ends (`end` says the same). `renew_session` forgets what was said before. `stop` ends the round that runs.
    `request_output_len` 0 takes the prompt in and answers nothing.
    """

    prompt: str | Messages | None = None
    messages: str | Messages | None = None
    session_id: int = Field(default=-1, ge=-1, le=2**63 - 1)
    interactive_mode: bool = False
    renew_session: bool = False
    stream: bool = False
    stop: bool = False
    end: bool = False
    request_output_len: int | None = Field(default=512, ge=0, le=2**31 - 1)
    top_p: float = Field(default=0.8, ge=0, le=1)
    top_k: int = Field(default=40, ge=0, le=2**31 - 1)
    temperature: float = Field(default=0.8, ge=0, le=2)
    repetition_penalty: float = Field(default=1.0, ge=LEAST_PENALTY, le=100)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = Field(default=None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)

    @model_validator(mode="after")
    def fields_fit_together(self) -> InteractiveRequest:
        if self.prompt is not None and self.messages is not None:
            raise RefusedField("'prompt' and 'messages' mean the same: give one of them.", param="messages")
        if self.session_id == -1 and (self.interactive_mode or self.stop):
            raise RefusedField("A session that is kept or stopped needs a 'session_id' from 0 on.", param="session_id")
        if self.interactive_mode and self.end:
            raise RefusedField(
                "'interactive_mode' keeps the session and 'end' forgets it: give one of them.", param="end"
            )
        return self

    @property
    def turns(self) -> list[dict[str, Any]]:
        said = self.prompt if self.messages is None else self.messages
        if isinstance(said, str):
            return [{"role": "user", "content": said}] if said else []
        return [message.for_template() for message in said or ()]

    def sampling(self, *, most: int) -> Sampling:
        return Sampling(
            max_new_tokens=most,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
        )


class Interactive:
    """The endpoint; `router` has it under both names."""

    def __init__(self, generation: Generation, conversations: Conversations) -> None:
        self._generation = generation
        self._conversations = conversations
        self.router = APIRouter()
        self.router.add_api_route("/v1/chat/interactive", self.chat, methods=["POST"], response_model=None)
        self.router.add_api_route("/generate", self.chat, methods=["POST"], response_model=None, deprecated=True)

    async def chat(self, request: Request, asked: InteractiveRequest) -> Response | dict[str, Any]:
        owner, number = owner_of(request), asked.session_id
        if asked.stop:
            self._conversations.stop(owner, number)
            if asked.end:
                self._conversations.finish(owner, number, keep=False)
            return _line("", tokens=0, history=0, prompt=0, reason="stop")
        if number == -1:
            return await self._round(request, asked, Conversation(), _Ending(None, owner, number, keep=False))
        conversation = self._conversations.begin(owner, number, renew=asked.renew_session)
        ending = _Ending(self._conversations, owner, number, keep=asked.interactive_mode)
        try:
            return await self._round(request, asked, conversation, ending)
        except BaseException:
            # A round that could not be leaves what was said before as it was.
            ending.close(keep=bool(conversation.turns) or asked.interactive_mode)
            raise

    async def _round(
        self, request: Request, asked: InteractiveRequest, conversation: Conversation, ending: _Ending
    ) -> Response | dict[str, Any]:
        history = conversation.tokens
        if not asked.turns:
            ending.close()
            return _line("", tokens=0, history=history, prompt=0, reason="stop")
        turns = [*conversation.turns, *asked.turns]
        with self._generation.let_in(request, 1) as arrival:
            prompt_ids = await self._ids(arrival, turns)
            room = self._generation.room(prompt_ids, param="prompt")
            if asked.request_output_len == 0:
                conversation.turns, conversation.tokens = turns, len(prompt_ids)
                ending.close()
                return _line("", tokens=0, history=history, prompt=len(prompt_ids) - history, reason="stop")
            sampling = asked.sampling(most=min(asked.request_output_len or room, room))
            job = Job(prompt=0, prompt_ids=prompt_ids, sampling=sampling)
            answers = await self._generation.open(arrival, [job])
        conversation.stop = answers.stop
        lines = self._lines(answers, conversation, turns, len(prompt_ids), ending)

        def close() -> None:
            answers.close()
            ending.close()

        if asked.stream:
            return LineStream(answers, lines, close=close)
        try:
            return await unless_gone(request, _joined(answers, lines))
        finally:
            close()

    async def _ids(self, arrival: Arrival, turns: list[dict[str, Any]]) -> list[int]:
        tokenizer = self._generation.tokenizer
        size = sum(len(turn["content"]) for turn in turns)
        if tokenizer.chat_template is None:
            text = "".join(turn["content"] for turn in turns)
            return await self._generation.made(arrival, lambda: tokenizer.encode(text), size=size, param="prompt")
        return await self._generation.rendered(arrival, lambda: tokenizer.encode_chat(turns), size=size, param="prompt")

    def _lines(
        self,
        answers: Answers,
        conversation: Conversation,
        turns: list[dict[str, Any]],
        prompt: int,
        ending: _Ending,
    ) -> Iterator[str]:
        """LMDeploy's lines of JSON. What was said so far is kept, whichever way the round ends; it has ended when its
        last line is sent: who has read that may ask for the next."""
        history, texts = conversation.tokens, []
        try:
            while not answers.over:
                lines: list[str] = []
                for _, event in answers.take():
                    texts.append(event.text)
                    reason = "stop" if event.finish_reason == "abort" else event.finish_reason
                    conversation.turns = [*turns, {"role": "assistant", "content": "".join(texts)}]
                    conversation.tokens = prompt + event.completion_tokens
                    if reason:
                        ending.close()
                    if event.text or reason:
                        line = _line(
                            event.text,
                            tokens=event.completion_tokens,
                            history=history,
                            prompt=prompt - history,
                            reason=reason,
                        )
                        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
                yield "".join(lines)
        except EngineError as error:
            ending.close()
            yield json.dumps(engine_error_body(error)) + "\n"


class _Ending:
    """Ends a round once: by then the next one of its session may run, which is not ended with it."""

    def __init__(self, conversations: Conversations | None, owner: str, number: int, *, keep: bool) -> None:
        self._conversations = conversations
        self._owner = owner
        self._number = number
        self._keep = keep

    def close(self, *, keep: bool | None = None) -> None:
        if self._conversations is not None:
            self._conversations.finish(self._owner, self._number, keep=self._keep if keep is None else keep)
            self._conversations = None


def _line(text: str, *, tokens: int, history: int, prompt: int, reason: str | None) -> dict[str, Any]:
    """`tokens` is of the answer so far; `history_tokens` were said before, `input_tokens` are new."""
    return {
        "text": text,
        "tokens": tokens,
        "input_tokens": max(prompt, 0),
        "history_tokens": history,
        "finish_reason": reason,
    }


async def _joined(answers: Answers, lines: Iterator[str]) -> dict[str, Any]:
    """The last line, with the text of all."""
    texts: list[str] = []
    last: dict[str, Any] = {}
    for news in lines:
        for line in news.split("\n")[:-1]:
            last = json.loads(line)
            if "error" in last:
                code = last["error"]["code"]
                status = 504 if code == "deadline_exceeded" else 503
                raise RequestError(last["error"]["message"], status=status, code=code)
            texts.append(last["text"])
        if not answers.has_news:
            await answers.news()
    return {**last, "text": "".join(texts)}
