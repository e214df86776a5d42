"""`ingot chat URL | artifact=ID | folder=WORKSPACE`: a conversation in the terminal.

A message ends with an empty line; the arrow keys bring earlier lines back. Ctrl-C stops an answer, and nothing else.
/system TEXT sets the system prompt, /reset forgets the conversation, /params shows or sets how to sample
(/params temperature=0 max_tokens=100), /exit or Ctrl-D ends.
`ingot chat turbomind FOLDER` and `ingot chat torch FOLDER` are LMDeploy's commands.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from cli.arguments import Parser
from cli.key_files import first_key
from cli.target import Target, find_target, open_tokenizer
from engine.config import EngineConfig
from server.client import Client, Message, Params, ServerError

# A terminal obeys these: an answer must not move its cursor, name its window or write its clipboard.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMANDS = ("/system", "/reset", "/params", "/exit")


class Partner(ABC):
    """Whoever answers. `params` None: how to sample cannot be set."""

    params: Params | None = None

    @abstractmethod
    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """Pieces of text; closing it early aborts the answer."""

    def forget(self) -> None:  # noqa: B027 - most keep nothing between two answers
        """The conversation begins anew."""


def main(argv: list[str]) -> int:
    if argv[:1] in (["turbomind"], ["torch"]):
        from cli import seed_serve

        return seed_serve.chat_turbomind(argv[1:]) if argv[0] == "turbomind" else seed_serve.chat_torch(argv[1:])
    parser = Parser(
        prog="ingot chat",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("partner", help="the URL of a server, or artifact=ID, or folder=WORKSPACE")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="the server's key, in a file as serve.api_key_file; or INGOT_API_KEY"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer")
    parser.add_argument("--waiver", metavar="REASON", help="run an artifact that has not passed its evaluation")
    parser.add_argument("--store", metavar="PATH", help="another store than this project's")
    options = parser.parse_args(argv)
    partner = connect(options)
    print("An empty line ends a message. /system, /reset, /params, /exit; Ctrl-C stops an answer.", flush=True)
    converse(partner, system=options.system)
    return 0


def connect(options: argparse.Namespace) -> Partner:
    key, _, value = options.partner.partition("=")
    params = Params(temperature=options.temperature, max_tokens=options.max_tokens)
    if options.partner.startswith(("http://", "https://")):
        with key_asked_for(options.partner):
            return RemotePartner(Client(options.partner, api_key=first_key(options.api_key_file)), params)
    if key in ("artifact", "folder") and value:
        target = find_target(
            artifact=value if key == "artifact" else None,
            folder=value if key == "folder" else None,
            waiver=options.waiver,
            store=options.store,
        )
        return LocalPartner(target, params)
    raise ValueError(
        f"{options.partner!r} is nobody to chat with: give a URL (http://...), artifact=ID or folder=WORKSPACE."
    )


@contextmanager
def key_asked_for(url: str) -> Iterator[None]:
    """A 401 of the server, as what to do here."""
    try:
        yield
    except ServerError as error:
        if error.status != 401:
            raise
        raise ValueError(f"{url} does not know this key: give --api-key-file=FILE, or INGOT_API_KEY.") from error


def converse(partner: Partner, *, system: str = "", words: dict[str, str] | None = None) -> None:
    """The dialogue, until /exit or the end of the input. `words` are messages that mean a command."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  what `input` edits lines with, and brings earlier ones back
    messages: list[Message] = []
    while (text := read_message(words or {})) is not None:
        command, _, rest = text.partition(" ")
        if command == "/reset":
            messages.clear()
            partner.forget()
            print("(the conversation is forgotten)")
        elif command == "/system":
            system = rest.strip() or system
            print(f"(system prompt: {system})" if system else "(no system prompt; /system TEXT sets one)")
        elif command == "/params":
            set_params(partner, rest.split())
        elif re.fullmatch(r"/[a-z]+", text):
            print(f"({text} is no command: {', '.join(COMMANDS)})")
        else:
            messages.append({"role": "user", "content": text})
            first = [{"role": "system", "content": system}] if system else []
            answer = show_answer(partner, [*first, *messages])
            if answer is None:
                messages.pop()  # refused: the next message must not be sent together with it
            else:
                messages.append({"role": "assistant", "content": answer})


def set_params(partner: Partner, given: list[str]) -> None:
    """Set `name=value`s, or say what is wrong with one and set none; then show all."""
    if partner.params is None:
        print("(how to sample cannot be set here)")
        return
    kinds = {"top_k": int, "max_tokens": int, "seed": int, "stop": str}
    names = [field.name for field in dataclasses.fields(Params)]
    changes: dict[str, object] = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in names:
            print(f"({name} is no parameter: {', '.join(names)})")
            return
        try:
            changes[name] = None if value in ("", "none") else kinds.get(name, float)(value)
        except ValueError:
            print(f"({item}: {name} is a {'whole ' if name in kinds else ''}number)")
            return
    partner.params = dataclasses.replace(partner.params, **changes)  # type: ignore[arg-type]
    shown = " ".join(f"{name}={value}" for name, value in partner.params.given().items())
    print(f"({shown or 'all as the server has them'})")


def read_message(words: dict[str, str]) -> str | None:
    """Lines up to an empty one, or a command; None when the conversation is over. Ctrl-C drops what was typed."""
    lines: list[str] = []
    while True:
        try:
            line = input("... " if lines else ">>> ")
        except KeyboardInterrupt:
            print("" if lines else "\n(/exit or Ctrl-D ends)")
            lines.clear()
            continue
        except EOFError:
            print()
            return "\n".join(lines) or None
        if not lines:
            line = words.get(line.strip(), line)
            if line.strip() == "/exit":
                return None
            if line.split(" ")[0].strip() in COMMANDS or re.fullmatch(r"/[a-z]+", line.strip()):
                return line.strip()
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
            print(CONTROLS.sub("\ufffd", piece), end="", flush=True)
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


class RemotePartner(Partner):
    """A server with OpenAI's API; its first model answers."""

    def __init__(self, client: Client, params: Params) -> None:
        self._client = client
        self._model = client.model().id
        self.params: Params = params

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        with contextlib.closing(self._client.chat(messages, self.params, model=self._model)) as answer:
            yield from answer


class LocalPartner(Partner):
    """An engine in this process."""

    def __init__(self, target: Target, params: Params, engine: EngineConfig | None = None) -> None:
        """`engine` says how it runs; by default as the folder does."""
        from engine.runtime.engine import Engine
        from engine.storage.artifacts import verify

        if target.model.artifact_id:
            verify(target.folder, target.model.artifact_id)
        self._tokenizer = open_tokenizer(target)
        ends = self._tokenizer.eos_token_ids
        config = dataclasses.replace(engine or EngineConfig(), max_batch_size=1, end_ids=ends)
        self._engine = Engine.from_workspace(target.folder, config)
        self.params: Params = params

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        from engine.config import Sampling

        given = self.params.given()
        if "max_tokens" in given:
            given["max_new_tokens"] = given.pop("max_tokens")
        if "stop" in given:
            given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
        request_id = self._engine.add(self._tokenizer.encode_chat(messages), Sampling(**given))
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
