"""TurboMind's sessions over an engine: rounds that continue what was said, rewinding, stopping. Free of torch.

The tokens of a session are kept here; its K and V are in the engine's prefix cache, or are computed again.
"""

from __future__ import annotations

import queue
import threading
import traceback
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from engine.config import Sampling

if TYPE_CHECKING:
    from engine.runtime.engine import Engine

MOST_SESSIONS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """One round of a session, or a wish about one.

    - `session_id`: None is a session of its own that ends with the round.
    - `start` forgets what the session had; without it the session must be known. `end` forgets it after the round.
    - `step` from 0 on keeps only so many of the session's tokens, -1 all; then `input_ids` are added.
    - `session_len`: most tokens of the session in this round; 0 is the engine's.
    - `sampling.max_new_tokens` 0 computes nothing: the tokens are taken in, and `end` is obeyed.
    - `stop` ends the round that runs and takes no tokens in; with `end` the session is forgotten as well.
    """

    session_id: int | None = None
    start: bool = False
    end: bool = False
    stop: bool = False
    input_ids: Sequence[int] = ()
    step: int = -1
    session_len: int = 0
    sampling: Sampling = field(default_factory=Sampling)


class Reply(Protocol):
    """Takes all tokens of the session so far, at once copied by whoever keeps them; False when nobody listens."""

    def __call__(self, token_ids: Sequence[int], *, final: bool, error: str | None = None) -> bool: ...


@dataclass(slots=True, kw_only=True)
class Session:
    """`request_id` and `reply` are those of the round that runs, None between rounds."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    request_id: str | None = None
    reply: Reply | None = None
    ending: bool = False


class Sessions:
    """Sessions by id, the one unused for longest first. Not thread-safe, as the engine is not."""

    def __init__(self, engine: Engine, *, most_sessions: int = MOST_SESSIONS) -> None:
        """A new session beyond `most_sessions` makes the idle one be forgotten that was unused for longest."""
        self._engine = engine
        self._most = most_sessions
        self._sessions: dict[int, Session] = {}
        self._rounds: dict[str, tuple[int, Session]] = {}
        self._next_anonymous = -1

    def __len__(self) -> int:
        return len(self._sessions)

    def has_work(self) -> bool:
        return self._engine.has_work()

    def take(self, request: SessionRequest, reply: Reply) -> None:
        """Begin what is asked. What cannot be done is replied as an error, and leaves the session as it was."""
        try:
            if request.stop:
                self._stop(request, reply)
            else:
                self._begin(request, reply)
        except ValueError as error:
            reply((), final=True, error=str(error))

    def step(self) -> None:
        """Compute one step and reply what is new."""
        for event in self._engine.step():
            session_id, session = self._rounds[event.request_id]
            session.tokens.extend(event.token_ids)
            final = event.finish_reason is not None
            assert session.reply is not None
            heard = session.reply(session.tokens, final=final)
            if final:
                session.request_id = session.reply = None
                del self._rounds[event.request_id]
                if session.ending:
                    del self._sessions[session_id]
            elif not heard:
                self._engine.abort(event.request_id)

    def fail(self, error: str) -> None:
        """Reply an error to every round that runs."""
        for _, session in self._rounds.values():
            assert session.reply is not None
            session.reply((), final=True, error=error)
        self._rounds.clear()

    def _begin(self, request: SessionRequest, reply: Reply) -> None:
        session_id, start, end = request.session_id, request.start, request.end
        if session_id is None:
            session_id, start, end = self._next_anonymous, True, True
        known = self._sessions.get(session_id)
        if known is not None and known.request_id is not None:
            raise ValueError(f"Session {session_id} is answering: wait for its answer, or send STOP first.")
        if known is None and not start:
            raise ValueError(
                f"There is no session {session_id}: begin it with START 1. It may have ended or been forgotten; "
                f"{self._most} are kept."
            )
        before = array("I") if start or known is None else known.tokens
        if not -1 <= request.step <= len(before):
            raise ValueError(
                f"step is {request.step}, but session {session_id} has {len(before)} tokens: give -1 to keep them all, "
                "or how many are kept."
            )
        tokens = before if request.step < 0 else before[: request.step]
        tokens = tokens + array("I", request.input_ids)
        room = self._session_len(request) - len(tokens)
        if room < 0 or (room == 0 and request.sampling.max_new_tokens):
            raise ValueError(
                f"Session {session_id} would have {len(tokens)} tokens before its answer, but session_len is "
                f"{len(tokens) + room}. Shorten it with step, or START it anew."
            )
        session = Session(tokens=tokens, reply=reply, ending=end)
        if request.sampling.max_new_tokens:
            longest = min(request.sampling.max_new_tokens, room)
            sampling = replace(request.sampling, max_new_tokens=longest)
            session.request_id = self._engine.add(tokens.tolist(), sampling)
            self._rounds[session.request_id] = session_id, session
        self._sessions.pop(session_id, None)
        self._sessions[session_id] = session
        self._next_anonymous -= request.session_id is None
        if session.request_id is None:
            session.reply = None
            reply(tokens, final=True)
            if end:
                del self._sessions[session_id]
        self._forget()

    def _stop(self, request: SessionRequest, reply: Reply) -> None:
        if request.start:
            raise ValueError("START and STOP exclude each other: one begins a session, the other ends its round.")
        session = None if request.session_id is None else self._sessions.get(request.session_id)
        if session is None or (session.request_id is None and not request.end):
            raise ValueError(f"Session {request.session_id} is not answering: there is nothing to stop.")
        if session.request_id is not None:
            self._engine.abort(session.request_id)
            session.ending |= request.end
        elif request.session_id is not None:
            del self._sessions[request.session_id]
        reply(session.tokens, final=True)

    def _session_len(self, request: SessionRequest) -> int:
        most = self._engine.session_len
        if not 0 <= request.session_len <= most:
            raise ValueError(f"session_len is {request.session_len}, but this engine has room for {most} tokens.")
        return request.session_len or most

    def _forget(self) -> None:
        idle = (session_id for session_id, session in self._sessions.items() if session.request_id is None)
        for session_id in [session_id for _, session_id in zip(range(len(self) - self._most), idle, strict=False)]:
            del self._sessions[session_id]


class SessionThread:
    """`Sessions` in a thread of its own, which alone touches the engine. Replies come from that thread."""

    def __init__(self, engine: Engine, *, most_sessions: int = MOST_SESSIONS) -> None:
        self._sessions = Sessions(engine, most_sessions=most_sessions)
        self._inbox: queue.SimpleQueue[tuple[SessionRequest, Reply] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: SessionRequest, reply: Reply) -> None:
        """Queue a request, from any thread. Not after `close`."""
        self._inbox.put((request, reply))

    def close(self) -> None:
        """End the thread; whoever waits for an answer gets an error."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._receive():
                self._sessions.step()
            self._sessions.fail("The engine was closed.")
        except Exception as error:
            # Whatever it was, the engine is in an unknown state: everybody is told, and nothing is computed any more.
            traceback.print_exc()
            failure = f"The engine has failed: {type(error).__name__}: {error}"
            self._sessions.fail(failure)
            while (item := self._inbox.get()) is not None:
                item[1]((), final=True, error=failure)

    def _receive(self) -> bool:
        """Take in what has come, waiting only when nothing is to be computed; False when it is to end."""
        wait = not self._sessions.has_work()
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            self._sessions.take(*item)
            wait = False


def turbomind_sampling(
    *,
    request_output_len: int,
    runtime_top_k: int,
    runtime_top_p: float,
    temperature: float,
    repetition_penalty: float,
    random_seed: int | None,
) -> Sampling:
    """TurboMind's rule: top_k 0 and top_p 0 together are greedy, top_p 0 beside a top_k is off."""
    greedy = runtime_top_k == 0 and runtime_top_p == 0
    return Sampling(
        max_new_tokens=request_output_len,
        temperature=0.0 if greedy else temperature,
        top_k=runtime_top_k,
        top_p=runtime_top_p or 1.0,
        repetition_penalty=repetition_penalty,
        seed=random_seed,
    )
