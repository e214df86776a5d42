"""A typed client of the server: what `ingot chat` and `ingot web` speak through, and a program may too.

    with Client("http://127.0.0.1:23333", api_key="...") as client:
        answer = client.chat([{"role": "user", "content": "Hello"}], Params(temperature=0))
        for piece in answer:
            print(piece, end="")
        print(answer.usage)

It talks to the address that it was given and to nobody else: no proxy, no redirect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

Message = dict[str, str]
SECONDS_TO_CONNECT = 10
ERRNO = re.compile(r"^\[Errno -?\d+\] ")


class ServerError(ValueError):
    """What the server said instead of an answer, or that there is none. `status` is HTTP's, None without a reply."""

    def __init__(self, text: str, *, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """How to sample, as the request has it; None leaves the choice to the server. `max_tokens` None is no limit."""

    temperature: float | None = 0.7
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = 512
    seed: int | None = None
    stop: str | list[str] | None = None

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A line of /v1/models. `artifact_id` is None for a folder that nobody verified, or another program's model."""

    id: str
    artifact_id: str | None = None
    recipe: str | None = None
    verdict: str | None = None
    session_len: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Client:
    """Every method raises ServerError. An empty `api_key` sends none; a key is only ever sent as a header."""

    def __init__(self, url: str, *, api_key: str = "") -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ServerError("the API key has characters that no key has: it is printable ASCII, on one line.")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(SECONDS_TO_CONNECT, read=None),
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise ServerError(f"{url!r} is not a URL: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Model]:
        content = self._json("GET", "/v1/models", timeout=SECONDS_TO_CONNECT)
        names = [field.name for field in dataclasses.fields(Model)]
        try:
            return [Model(**{name: each.get(name) for name in names}) for each in content["data"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} does not answer like a server with OpenAI's API.") from error

    def model(self) -> Model:
        """The first of `models`: this server has one."""
        if not (models := self.models()):
            raise ServerError(f"{self.url} serves no model.")
        return models[0]

    def chat(self, messages: Sequence[Message], params: Params | None = None, *, model: str | None = None) -> Answer:
        """The answer to a conversation, piece by piece; it is asked for when the first piece is."""
        return self._stream("/v1/chat/completions", {"messages": list(messages)}, params, model)

    def complete(self, prompt: str, params: Params | None = None, *, model: str | None = None) -> Answer:
        """How a text goes on, without a chat template."""
        return self._stream("/v1/completions", {"prompt": prompt}, params, model)

    def tokenize(self, text: str) -> list[int]:
        return list(self._json("POST", "/tokenize", {"prompt": text})["tokens"])

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return str(self._json("POST", "/detokenize", {"tokens": list(token_ids)})["prompt"])

    def interactive(self, session_id: int, prompt: str | Sequence[Message], **options: Any) -> Answer:
        """A round of a session that the server keeps (LMDeploy's endpoint); `options` are its fields."""
        body = {
            "session_id": session_id,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "interactive_mode": True,
            "stream": True,
            **options,
        }
        return Answer(self._http, "/v1/chat/interactive", body)

    def end_session(self, session_id: int) -> None:
        self._json("POST", "/v1/chat/interactive", {"session_id": session_id, "prompt": "", "end": True})

    def _stream(self, path: str, body: dict[str, Any], params: Params | None, model: str | None) -> Answer:
        body |= {"model": model or self.model().id, **(params or Params()).given()}
        return Answer(self._http, path, body | {"stream": True, "stream_options": {"include_usage": True}})

    def _json(self, method: str, path: str, body: object = None, *, timeout: float | None = None) -> Any:
        with _failures(self.url):
            response = self._http.request(method, path, json=body, timeout=timeout)
            check(response)
            return response.json()


class Answer:
    """An iterator over the pieces of an answer; when it ends, `usage`, `finish_reason` and the times are known.

    `close` from the thread that iterates, or `stop` from any, ends it early, and the server's work on it.
    `first_seconds` is from the request to the first piece, `seconds` from there to the end.
    """

    def __init__(self, http: httpx.Client, path: str, body: dict[str, Any]) -> None:
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.fingerprint: str | None = None
        self.first_seconds: float | None = None
        self.seconds = 0.0
        self.stopped = False
        self._request = (http, path, body)
        self._lock = threading.Lock()
        self._response: httpx.Response | None = None
        self._pieces = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    def stop(self) -> None:
        """End the answer now, though a piece may be waited for: the connection is shut down under the reader."""
        with self._lock:
            self.stopped = True
            if self._response is not None:
                connection = self._response.extensions["network_stream"].get_extra_info("socket")
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where that cannot be said."""
        if self.usage is None or self.usage.completion_tokens < 2 or not self.seconds:
            return None
        return (self.usage.completion_tokens - 1) / self.seconds

    def _read(self) -> Generator[str, None, None]:
        http, path, body = self._request
        begun = time.perf_counter()
        try:
            with _failures(str(http.base_url)), http.stream("POST", path, json=body) as response:
                if response.is_error:
                    response.read()
                check(response)
                with self._lock:
                    self._response = response
                try:
                    for line in response.iter_lines():
                        if self.stopped:
                            return
                        if piece := self._piece(line):
                            now = time.perf_counter()
                            if self.first_seconds is None:
                                self.first_seconds = now - begun
                            self.seconds = now - begun - self.first_seconds
                            yield piece
                            if self.stopped:
                                return
                finally:
                    with self._lock:
                        self._response = None
        except ServerError:
            if not self.stopped:
                raise
        if not self.stopped and self.finish_reason is None:
            raise ServerError("the server ended the answer before it was finished.")

    def _piece(self, line: str) -> str:
        """The text in a line of either stream: OpenAI's events, or LMDeploy's lines of JSON."""
        line = line.removeprefix("data: ").strip()
        if not line.startswith("{"):
            return ""
        content = json.loads(line)
        if "error" in content:
            raise ServerError(str(content["error"]["message"]))
        if "choices" not in content:  # LMDeploy's
            self.finish_reason = content["finish_reason"]
            counts = content["input_tokens"] + content["history_tokens"], content["tokens"]
            self.usage = Usage(prompt_tokens=counts[0], completion_tokens=counts[1])
            return str(content["text"])
        self.fingerprint = content.get("system_fingerprint")
        if usage := content.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self.usage = Usage(
                prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"], cached_tokens=cached
            )
        text = ""
        for choice in content["choices"]:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        return text


def check(response: httpx.Response) -> None:
    """ServerError with the server's own words for anything but success."""
    if response.is_success:
        return
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = f"the server answers with HTTP status {response.status_code}"
    raise ServerError(text, status=response.status_code)


def reason(error: Exception) -> str:
    """What went wrong with a connection, without the system's number and the full stop."""
    return ERRNO.sub("", str(error)).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _failures(url: str) -> Iterator[None]:
    """What goes wrong on the way, as ServerError."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        text = f"no server answers at {url}: {reason(error)}. Start one with `ingot serve artifact=ID`."
        raise ServerError(text) from error
    except httpx.HTTPError as error:
        raise ServerError(f"the connection to the server failed: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ServerError(f"{url} does not answer like a server with OpenAI's API.") from error
