"""`ingot chat URL | artifact=ID | folder=WORKSPACE`: a conversation in the terminal.

A message ends with an empty line. /reset forgets the conversation, /exit ends it, Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx

from cli.arguments import Parser
from cli.target import Target, find_target, open_tokenizer

Message = dict[str, str]


class Partner(Protocol):
    """Whoever answers: `answer` yields pieces of text, and closing it early aborts the answer."""

    def answer(self, messages: list[Message]) -> Generator[str, None, None]: ...


def main(argv: list[str]) -> int:
    parser = Parser(prog="ingot chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("partner", help="the URL of a server, or artifact=ID, or folder=WORKSPACE")
    parser.add_argument("--api-key-file", metavar="FILE", help="the server's key; or INGOT_API_KEY")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer")
    parser.add_argument("--waiver", metavar="REASON", help="run an artifact that has not passed its evaluation")
    parser.add_argument("--store", metavar="PATH", help="another store than this project's")
    options = parser.parse_args(argv)
    partner = connect(options)
    print("An empty line ends a message. /reset forgets the conversation, /exit ends it.", flush=True)
    converse(partner)
    return 0


def connect(options: argparse.Namespace) -> Partner:
    key, _, value = options.partner.partition("=")
    if options.partner.startswith(("http://", "https://")):
        if options.api_key_file:
            api_key = Path(options.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        else:
            api_key = os.environ.get("INGOT_API_KEY", "")
        return RemotePartner(
            options.partner, api_key=api_key, temperature=options.temperature, max_tokens=options.max_tokens
        )
    if key in ("artifact", "folder") and value:
        target = find_target(
            artifact=value if key == "artifact" else None,
            folder=value if key == "folder" else None,
            waiver=options.waiver,
            store=options.store,
        )
        return LocalPartner(target, temperature=options.temperature, max_tokens=options.max_tokens)
    raise ValueError(
        f"{options.partner!r} is nobody to chat with: give a URL (http://...), artifact=ID or folder=WORKSPACE."
    )


def converse(partner: Partner) -> None:
    """The dialogue, until /exit, the end of the input, or Ctrl-C at the prompt."""
    messages: list[Message] = []
    while (text := read_message()) is not None:
        if text == "/reset":
            messages.clear()
            print("(the conversation is forgotten)")
            continue
        messages.append({"role": "user", "content": text})
        answer = show_answer(partner, messages)
        if answer is None:
            messages.pop()  # refused: the next message must not be sent together with it
        else:
            messages.append({"role": "assistant", "content": answer})


def read_message() -> str | None:
    """Lines up to an empty one, or a command; None when there is nothing more to read."""
    lines: list[str] = []
    while True:
        try:
            line = input("... " if lines else ">>> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return "\n".join(lines) or None
        if not lines and line.strip() in ("/exit", "/reset"):
            return None if line.strip() == "/exit" else "/reset"
        if line:
            lines.append(line)
        elif lines:
            return "\n".join(lines)


def show_answer(partner: Partner, messages: list[Message]) -> str | None:
    """Print an answer as it comes and return what was printed; None when the messages were refused."""
    pieces: list[str] = []
    answer = partner.answer(messages)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except ValueError as error:
        print(f"({error})")
        return None
    finally:
        answer.close()
    print()
    return "".join(pieces)


class RemotePartner:
    """A server with OpenAI's API; its first model answers."""

    def __init__(self, url: str, *, api_key: str, temperature: float, max_tokens: int) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No proxy from the environment: this talks to the address that was given and to nobody else.
        timeout = httpx.Timeout(10, read=None)
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False)
        self._options = {"temperature": temperature, "max_tokens": max_tokens, "stream": True}
        try:
            response = self._http.get("/v1/models", timeout=10)
            check(response)
            self._model = response.json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(
                f"no server answers at {url}: {error}. Start one with `ingot serve artifact=ID`."
            ) from error
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{url} does not answer like a server with OpenAI's API.") from error

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        body = {"model": self._model, "messages": messages, **self._options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                check(response)
                for line in response.iter_lines():
                    yield from piece_of(line)
        except httpx.HTTPError as error:
            raise ValueError(f"the connection to the server failed: {error}") from error


def piece_of(line: str) -> Iterator[str]:
    """The text in one line of a stream, if any."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    content = json.loads(line.removeprefix("data: "))
    if "error" in content:
        raise ValueError(content["error"]["message"])
    for choice in content["choices"]:
        if text := choice["delta"].get("content"):
            yield text


def check(response: httpx.Response) -> None:
    """ValueError with the server's own words for an answer other than success."""
    if response.is_error:
        try:
            text = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"HTTP status {response.status_code}"
        raise ValueError(text)


class LocalPartner:
    """An engine in this process."""

    def __init__(self, target: Target, *, temperature: float, max_tokens: int) -> None:
        from engine.config import EngineConfig, Sampling
        from engine.runtime.engine import Engine
        from engine.storage.artifacts import verify

        if target.model.artifact_id:
            verify(target.folder, target.model.artifact_id)
        self._tokenizer = open_tokenizer(target)
        config = EngineConfig(max_batch_size=1, end_ids=self._tokenizer.eos_token_ids)
        self._engine = Engine.from_workspace(target.folder, config)
        self._sampling = Sampling(temperature=temperature, max_new_tokens=max_tokens)

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        request_id = self._engine.add(self._tokenizer.encode_chat(messages), self._sampling)
        with interrupts_noted() as interrupted:
            try:
                while self._engine.has_work():
                    for event in self._engine.step():
                        yield event.text
                    if interrupted:
                        raise KeyboardInterrupt
            finally:
                self._engine.abort(request_id)
                if self._engine.has_work():
                    self._engine.step()


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of breaking into a step of the engine, which must end whole."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
