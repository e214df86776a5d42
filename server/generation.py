"""From a valid request to the engine's answers: what every endpoint that generates shares."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import Request, Response

from engine.config import Grammar, Sampling
from engine.runtime.client import EngineClient
from engine.runtime.tokenizer import Tokenizer
from server.access_log import ANSWERS
from server.admission import Admission
from server.answer_shapes import ChatShape
from server.answers import Answers, Job
from server.config import ServedModel
from server.errors import RequestError
from server.event_stream import ClientGone, EventStream, unless_gone
from server.grammars import PreparedGrammars
from server.guard import owner_of
from server.metrics import Metrics

Made = TypeVar("Made")
TIMEOUT_HEADER = "X-Request-Timeout"
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
LONG_TEXT = 2000
MOST_ANSWERS = 1024
# No token of a vocabulary that is in use stands for more characters.
LONGEST_TOKEN = 256


class Generation:
    """One engine with its tokenizer, and the model that they are."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        model: ServedModel,
        admission: Admission,
        metrics: Metrics,
        *,
        timeout: float | None = None,
    ) -> None:
        """`timeout` is the most seconds that a request may take; None for as long as it takes."""
        self.client = client
        self.tokenizer = tokenizer
        self.model = model
        self._admission = admission
        self._metrics = metrics
        self._timeout = timeout
        self.grammars = PreparedGrammars(client, tokenizer.folder)

    def check_model(self, name: str) -> None:
        if not self.model.answers_to(name):
            raise RequestError(
                f"The model {name!r} is not here; this server has {self.model.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def made(self, make: Callable[[], Made], *, size: int, param: str) -> Made:
        """What `make` returns, in a thread for a long text: tokenizing must not hold up other answers."""
        if size > LONGEST_TOKEN * self.client.session_len:
            raise RequestError(
                f"The text has {size} characters; prompt and answer together can have {self.client.session_len} "
                "tokens.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            return await anyio.to_thread.run_sync(make) if size > LONG_TEXT else make()
        except ValueError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error

    def room(self, prompt_ids: Sequence[int], *, param: str) -> int:
        """Tokens that an answer to this prompt can have."""
        if not prompt_ids:
            raise RequestError("The prompt is empty.", param=param, code="invalid_value")
        room = self.client.session_len - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"The prompt has {len(prompt_ids)} tokens; prompt and answer together can have "
                f"{self.client.session_len}.",
                param=param,
                code="context_length_exceeded",
            )
        return room

    def jobs(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Callable[[int, int], Sampling],
        *,
        answers: int,
        limit: int | None,
        param: str,
    ) -> list[Job]:
        """A job for every prompt and answer, in OpenAI's order: all answers to the first prompt first. `sampling` is
        called with the most tokens and the number of the answer."""
        if len(prompts) * answers > MOST_ANSWERS:
            raise RequestError(f"More than {MOST_ANSWERS} answers in one request.", param="n", code="invalid_value")
        jobs: list[Job] = []
        for number, prompt_ids in enumerate(prompts):
            room = self.room(prompt_ids, param=param)
            for answer in range(answers):
                options = sampling(room if limit is None else min(limit, room), answer)
                jobs.append(Job(prompt=number, prompt_ids=prompt_ids, sampling=options))
        return jobs

    async def with_grammar(self, jobs: list[Job], grammar: Grammar | None, *, param: str) -> list[Job]:
        """The jobs with a grammar that the engine has been told."""
        if grammar is None:
            return jobs
        try:
            await self.grammars.prepare(grammar)
        except ValueError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error
        return [dataclasses.replace(job, sampling=dataclasses.replace(job.sampling, grammar=grammar)) for job in jobs]

    async def open(self, request: Request, jobs: Sequence[Job], *, priority: int = 0) -> Answers:
        """The answers of the engine, once it has accepted the jobs. ClientGone where the client leaves before that."""
        owner, seconds = owner_of(request), self._seconds(request)
        opening = Answers.open(
            self.client,
            jobs,
            admission=self._admission,
            metrics=self._metrics,
            owner=owner,
            priority=priority,
            seconds=seconds,
        )
        try:
            answers = await unless_gone(request, opening)
        except RequestError as error:
            self._metrics.refused(error.code or "invalid_value")
            raise
        request.scope[ANSWERS] = answers
        return answers

    def _seconds(self, request: Request) -> float | None:
        """How long the request may take: what its header says, at most the server's own limit."""
        asked = request.headers.get(TIMEOUT_HEADER)
        if asked is None:
            return self._timeout
        if not SECONDS.fullmatch(asked) or not float(asked):
            raise RequestError(
                f"The header {TIMEOUT_HEADER} must be a number of seconds above 0.", code="invalid_value"
            )
        return float(asked) if self._timeout is None else min(float(asked), self._timeout)

    async def answer(
        self, request: Request, jobs: list[Job], shape: ChatShape, *, stream: bool, priority: int = 0
    ) -> Response | dict[str, Any]:
        try:
            answers = await self.open(request, jobs, priority=priority)
            if stream:
                return EventStream(shape.lines(answers, len(jobs)), close=answers.close)
            try:
                return await unless_gone(request, shape.whole(answers, len(jobs)))
            finally:
                answers.close()
        except ValueError as error:
            raise RequestError(str(error), code="invalid_value") from error
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; the number is nginx's for the log
