"""From the engine's events of one answer to what is new in it: text, pieces of tool calls, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.runtime.event import Event, TokenLogprob
from server.logprobs import LogprobQueue
from server.tool_parser import CallPiece, ToolParser


class Delta(NamedTuple):
    """What one event adds. `finish_reason` is OpenAI's; `logprobs` is None where they were not asked for."""

    content: str = ""
    calls: Sequence[CallPiece] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.content or self.calls or self.logprobs)


class AnswerReader:
    """Reads the events of one answer. With a `parser`, calls of tools are found in its text.

    `calls_end` is the finish reason of an answer that called: OpenAI says "tool_calls", and "stop" where the function
    was named by the request.
    """

    def __init__(
        self, *, logprobs: LogprobQueue | None = None, parser: ToolParser | None = None, calls_end: str = "tool_calls"
    ) -> None:
        self._logprobs = logprobs
        self._parser = parser
        self._calls_end = calls_end

    def read(self, event: Event) -> Delta:
        entries = None if self._logprobs is None else self._logprobs.take(event)
        reason: str | None = event.finish_reason
        if self._parser is None:
            return Delta(event.text, (), entries, reason)
        pieces = self._parser.push(event.text)
        if reason is not None:
            pieces += self._parser.finish()
            if reason == "stop" and self._parser.calls:
                reason = self._calls_end
        return Delta(
            content="".join(piece for piece in pieces if isinstance(piece, str)),
            calls=[piece for piece in pieces if isinstance(piece, CallPiece)],
            logprobs=entries,
            finish_reason=reason,
        )
