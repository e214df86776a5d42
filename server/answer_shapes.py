"""Answers in OpenAI's shapes, whole and as chunks of a stream: both are made of the same deltas."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring
from typing import Any

from engine.runtime.client import EngineError
from engine.runtime.event import TokenLogprob
from engine.runtime.tokenizer import Tokenizer
from server.answer_reader import AnswerReader, Delta
from server.answers import Answers
from server.config import ServedModel
from server.errors import engine_error_body
from server.event_stream import DONE, encoded, event_line
from server.logprobs import chat_logprobs, completion_logprobs

Choice = dict[str, Any]
quoted = encode_basestring  # as `encoded` writes a text


class ChatShape:
    """Chat completions. `reader` makes what reads one answer."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: ServedModel, tokenizer: Tokenizer, reader: Callable[[], AnswerReader], *, with_usage: bool
    ) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        # What every chunk begins with is written once: a stream has a chunk for every token.
        self._chunk_head = encoded({**self._head, "object": self.chunk_kind})[:-1]
        self._tokenizer = tokenizer
        self._reader = reader
        self._with_usage = with_usage

    async def whole(self, answers: Answers, count: int) -> dict[str, Any]:
        """The answers when all are finished."""
        readers = [self._reader() for _ in range(count)]
        deltas: list[list[Delta]] = [[] for _ in range(count)]
        while not answers.over:
            await answers.news()
            for index, event in answers.take():
                deltas[index].append(readers[index].read(event))
        choices = [self.choice(index, each) for index, each in enumerate(deltas)]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": answers.usage()}

    def lines(self, answers: Answers, count: int) -> Iterator[str]:
        """The lines of the stream for `LineStream`. Text and finish reason come in chunks of their own, as OpenAI sends
        them."""
        readers = [self._reader() for _ in range(count)]
        sent = [0] * count
        plain = [self._around_text(index) for index in range(count)]
        lines = [self._line([opening]) for index in range(count) if (opening := self.opening(index))]
        try:
            while not answers.over:
                for index, event in answers.take():
                    delta = readers[index].read(event)
                    if delta.content and delta.logprobs is None and not delta.calls:
                        lines.append(quoted(delta.content).join(plain[index]))
                    else:
                        lines += [self._line([piece]) for piece in self.pieces(index, delta, offset=sent[index])]
                    sent[index] += len(delta.content)
                    if delta.finish_reason:
                        lines.append(self._line([self.ending(index, delta.finish_reason)]))
                yield "".join(lines)
                lines = []
            usage = self._line([], usage=answers.usage()) if self._with_usage else ""
            yield usage + DONE
        except EngineError as error:
            yield "".join([*lines, event_line(engine_error_body(error))])

    def choice(self, index: int, deltas: Sequence[Delta]) -> Choice:
        content = "".join(delta.content for delta in deltas)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls := _joined_calls(deltas):
            message |= {"content": content if content.strip() else None, "tool_calls": calls}
        logprobs = None if (entries := _joined_logprobs(deltas)) is None else chat_logprobs(entries, self._tokenizer)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": deltas[-1].finish_reason,
        }

    def opening(self, index: int) -> Choice | None:
        """What is sent of an answer before its first token."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def pieces(self, index: int, delta: Delta, *, offset: int) -> list[Choice]:
        """The chunks of a delta: its content, with all of its log-probabilities, and each piece of a call."""
        chunks: list[Choice] = []
        if delta.content or delta.logprobs:
            logprobs = None if delta.logprobs is None else chat_logprobs(delta.logprobs, self._tokenizer)
            chunks.append(self._chunk(index, {"content": delta.content} if delta.content else {}, logprobs))
        return [*chunks, *(self._chunk(index, {"tool_calls": [piece.as_delta()]}) for piece in delta.calls)]

    def ending(self, index: int, finish_reason: str) -> Choice:
        return {**self._chunk(index, {}), "finish_reason": finish_reason}

    def _around_text(self, index: int) -> list[str]:
        """A chunk of nothing but text, in two parts: what comes before the text, and after it. Nearly all chunks are
        such, and of these only the text differs."""
        mark = uuid.uuid4().hex
        [piece] = self.pieces(index, Delta(content=mark), offset=0)
        return self._line([piece]).split(quoted(mark))

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> Choice:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _line(self, choices: list[Choice], usage: dict[str, Any] | None = None) -> str:
        tail = "" if not self._with_usage else ',"usage":null' if usage is None else f',"usage":{encoded(usage)}'
        return f'data: {self._chunk_head},"choices":{encoded(choices)}{tail}}}\n\n'


class CompletionShape(ChatShape):
    """Text completions: the same, with `text` for messages and deltas."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, deltas: Sequence[Delta]) -> Choice:
        text = "".join(delta.content for delta in deltas)
        return self._text(index, text, _joined_logprobs(deltas), finish_reason=deltas[-1].finish_reason)

    def opening(self, index: int) -> Choice | None:
        return None

    def pieces(self, index: int, delta: Delta, *, offset: int) -> list[Choice]:
        return [self._text(index, delta.content, delta.logprobs, offset=offset)] if delta else []

    def ending(self, index: int, finish_reason: str) -> Choice:
        return self._text(index, "", None, finish_reason=finish_reason)

    def _text(
        self,
        index: int,
        text: str,
        entries: Sequence[TokenLogprob] | None,
        *,
        offset: int = 0,
        finish_reason: str | None = None,
    ) -> Choice:
        logprobs = None if entries is None else completion_logprobs(entries, self._tokenizer, offset=offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _joined_logprobs(deltas: Sequence[Delta]) -> list[TokenLogprob] | None:
    if deltas[0].logprobs is None:
        return None
    return [entry for delta in deltas for entry in delta.logprobs or ()]


def _joined_calls(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for piece in (piece for delta in deltas for piece in delta.calls):
        if piece.name is not None:
            calls.append({"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}})
        calls[piece.index]["function"]["arguments"] += piece.arguments
    return calls
