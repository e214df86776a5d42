"""From a valid request to the engine's answers: what every endpoint that generates shares."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request, Response

from engine.config import Grammar, Sampling
from engine.runtime.client import EngineClient
from engine.runtime.tokenizer import Tokenizer
from server.access_log import ANSWERS
from server.admission import Admission, Visit
from server.answer_shapes import ChatShape
from server.answers import Answers, Job
from server.config import ServedModel
from server.errors import DeadlineExceeded, RequestError
from server.event_stream import EventStream, unless_gone
from server.fair_threads import FairThreads
from server.grammars import PreparedGrammars
from server.guard import owner_of
from server.metrics import Metrics
from server.traces import trace_of

Made = TypeVar("Made")
TIMEOUT_HEADER = "X-Request-Timeout"
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
LONG_TEXT = 2000
SHORT_AT_ONCE = 8
MOST_ANSWERS = 1024
# No token of a vocabulary that is in use stands for more characters.
LONGEST_TOKEN = 256


@dataclass(slots=True, kw_only=True)
class Arrival:
    """A request that has come. `visit` is its place in line, None where it has none or its answers have it; `until` is
    when its `seconds` are over, by the loop's clock."""

    request: Request
    owner: str
    seconds: float | None = None
    until: float | None = None
    visit: Visit | None = None


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
        # Half of the machine at most is for texts: the engine and the answers under way have the rest.
        self._texts = FairThreads(max(1, (os.cpu_count() or 1) // 2))
        self._compiling = FairThreads(1)
        self._short = anyio.CapacityLimiter(SHORT_AT_ONCE)

    def check_model(self, name: str) -> None:
        if not self.model.answers_to(name):
            raise RequestError(
                f"The model {name!r} is not here; this server has {self.model.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    @contextmanager
    def let_in(self, request: Request, answers: int) -> Iterator[Arrival]:
        """Takes a request in before any work is done for it. Its place in line is given back with the block, unless
        `open` handed it to the answers. RequestError, see `Admission.enter`, where there is no place."""
        if answers > MOST_ANSWERS:
            raise RequestError(f"More than {MOST_ANSWERS} answers in one request.", param="n", code="invalid_value")
        arrival = self.arrive(request)
        try:
            arrival.visit = self._admission.enter(arrival.owner, answers)
        except RequestError as error:
            self._metrics.refused(error.code or "invalid_value")
            raise
        try:
            yield arrival
        finally:
            if arrival.visit is not None:
                arrival.visit.close()

    def arrive(self, request: Request) -> Arrival:
        """A request that asks for no answer."""
        seconds = self._seconds(request)
        until = None if seconds is None else asyncio.get_running_loop().time() + seconds
        return Arrival(request=request, owner=owner_of(request), seconds=seconds, until=until)

    async def made(
        self, arrival: Arrival, make: Callable[[], Made], *, size: int, param: str, longest: int | None = None
    ) -> Made:
        """What `make` returns, in a thread for a long text: tokenizing must not hold up other answers. `size` is the
        characters of all texts, and `longest` those of the longest where they are several."""
        most = size if longest is None else longest
        if most > LONGEST_TOKEN * self.client.session_len:
            raise RequestError(
                f"The text has {most} characters; prompt and answer together can have {self.client.session_len} "
                "tokens.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            return make() if size <= LONG_TEXT else await self._apart(arrival, self._texts, make)
        except ValueError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error

    async def rendered(self, arrival: Arrival, make: Callable[[], Made], *, size: int, param: str) -> Made:
        """`made`, for what goes through the chat template: that is another process, and never waited for here."""
        if size > LONG_TEXT:
            return await self.made(arrival, make, size=size, param=param)
        try:
            return await anyio.to_thread.run_sync(make, limiter=self._short)
        except ValueError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error

    async def _apart(self, arrival: Arrival, threads: FairThreads, work: Callable[[], Made]) -> Made:
        """What `work` returns, in its turn. DeadlineExceeded or ClientGone where nobody waits for it any more."""
        try:
            async with asyncio.timeout_at(arrival.until):
                return await unless_gone(arrival.request, threads.run(arrival.owner, work))
        except TimeoutError:
            assert arrival.seconds is not None
            raise DeadlineExceeded.after(arrival.seconds) from None

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
        jobs: list[Job] = []
        for number, prompt_ids in enumerate(prompts):
            room = self.room(prompt_ids, param=param)
            for answer in range(answers):
                options = sampling(room if limit is None else min(limit, room), answer)
                jobs.append(Job(prompt=number, prompt_ids=prompt_ids, sampling=options))
        return jobs

    async def with_grammar(
        self, arrival: Arrival, jobs: list[Job], grammar: Grammar | None, *, param: str
    ) -> list[Job]:
        """The jobs with a grammar that the engine has been told."""
        if grammar is None:
            return jobs
        try:
            if (compile_ := self.grammars.unknown(grammar)) is not None:
                await self.grammars.tell(grammar, await self._apart(arrival, self._compiling, compile_))
        except ValueError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error
        return [dataclasses.replace(job, sampling=dataclasses.replace(job.sampling, grammar=grammar)) for job in jobs]

    async def open(self, arrival: Arrival, jobs: Sequence[Job], *, priority: int = 0) -> Answers:
        """The answers of the engine, once it has accepted the jobs; they keep the place in line from here on.
        ClientGone where the client leaves before that."""
        visit, arrival.visit = arrival.visit, None
        assert visit is not None, "let in"
        opening = Answers.open(
            self.client,
            jobs,
            visit=visit,
            metrics=self._metrics,
            trace=trace_of(arrival.request),
            owner=arrival.owner,
            priority=priority,
            seconds=arrival.seconds,
            until=arrival.until,
        )
        try:
            answers = await unless_gone(arrival.request, opening)
        except ValueError as error:
            raise RequestError(str(error), code="invalid_value") from error
        arrival.request.scope[ANSWERS] = answers
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
        self, arrival: Arrival, jobs: list[Job], shape: ChatShape, *, stream: bool, priority: int = 0
    ) -> Response | dict[str, Any]:
        answers = await self.open(arrival, jobs, priority=priority)
        if stream:
            return EventStream(answers, shape.lines(answers, len(jobs)), close=answers.close)
        try:
            return await unless_gone(arrival.request, shape.whole(answers, len(jobs)))
        finally:
            answers.close()
