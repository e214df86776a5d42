"""`ingot serve artifact=ID [serve.port=23333 serve.api_key_file=key.txt waiver="reason" ...]`: serve over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
import yaml

from cli.checkout import conf_folder
from cli.key_files import read_keys
from cli.main import fail
from cli.overrides import ServeCommand, compose_serve
from cli.target import Target, choose_goldens, find_target, open_tokenizer
from engine.runtime.client import EngineClient, EngineError
from engine.runtime.tokenizer import Tokenizer
from server import event_loop
from server.admission import Admission
from server.app import create_app
from server.config import AppConfig, ServeConfig, check_exposure
from server.connection import connection_class
from server.keys import Keys
from server.traces import Traces

HELP = """usage: ingot serve artifact=ID [KEY=VALUE ...] [--cfg job]

  artifact=ID        an id, a unique prefix of one, or a pinned name; it must have passed its evaluation
  folder=PATH        instead: a plain workspace folder, which nobody verified
  waiver="reason"    serve an artifact that has not passed; the reason is logged and shown in /v1/models
  store=PATH         another store than this checkout's
  --cfg job          print the configuration and stop

`ingot serve triton_client HOST:PORT` talks to a Triton server in the terminal. LMDeploy's api_server, api_client and
gradio are here too: `ingot serve api_server --help`.

Options, with their defaults (conf/serve/default.yaml):
"""
SECONDS_TO_FINISH = 10


def main(argv: list[str]) -> int:
    """Serve until SIGINT or SIGTERM: then 0. 1 when the engine ends on its own."""
    if argv[:1] == ["triton_client"]:
        from cli import triton_client

        return triton_client.main(argv[1:])
    if argv[:1] in (["api_server"], ["api_client"], ["gradio"]):
        from cli import seed_serve

        doors = {"api_server": seed_serve.api_server, "api_client": seed_serve.api_client, "gradio": seed_serve.gradio}
        return doors[argv[0]](argv[1:])
    if "-h" in argv or "--help" in argv:
        print(HELP + options_text(), end="")
        return 0
    show, overrides = split_flags(argv)
    command = compose_serve(overrides)
    if show:
        print(shown(command), end="")
        return 0
    keys = read_keys(command.serve)
    check_exposure(command.serve.host, keys)
    tls = tls_options(command.serve)
    traces = Traces.to(command.serve.traces) if command.serve.traces is not None else None
    target = find_target(
        artifact=command.artifact,
        folder=command.folder,
        waiver=command.waiver,
        store=command.store,
        model_name=command.serve.model_name,
    )
    with listening_socket(command.serve.host, command.serve.port) as listener:
        return event_loop.run(serve(target, command.serve, keys, tls, listener, traces))


def options_text() -> str:
    """The file of defaults with its comments, each option as it is written on the command line."""
    lines = (conf_folder() / "serve/default.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(f"serve.{line}" if line[0].isalpha() else line for line in lines)


def split_flags(argv: list[str]) -> tuple[bool, list[str]]:
    """(whether `--cfg job` is asked for, the rest)."""
    rest = list(argv)
    if "--cfg" not in rest:
        return False, rest
    at = rest.index("--cfg")
    if rest[at + 1 : at + 2] != ["job"]:
        raise ValueError("--cfg is followed by what to print, and only `--cfg job` is known.")
    del rest[at : at + 2]
    return True, rest


def shown(command: ServeCommand) -> str:
    """The configuration as YAML, without the key."""
    content: dict[str, Any] = dataclasses.asdict(command)
    del content["defaults"]
    if content["serve"]["api_key"] is not None:
        content["serve"]["api_key"] = "<hidden>"
    return yaml.safe_dump(content, sort_keys=False)


def tls_options(config: ServeConfig) -> dict[str, Any]:
    """uvicorn's options for TLS; empty without. ValueError where the two files cannot be used."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return {}
    certificate, key = (Path(name).expanduser() for name in (config.tls_cert_file, config.tls_key_file))
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"serve.tls_cert_file={certificate} and serve.tls_key_file={key} cannot be used: "
            f"{error.strerror or error}. Both must be PEM files, the key without a password, and belong together."
        ) from error
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address before the model is loaded, so that a busy port is said at once."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(f"serve.host={host} is not an address of this machine: {error.strerror}.") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port, or 0 for any free one."
        ) from error
    return listener


async def serve(
    target: Target,
    config: ServeConfig,
    keys: Keys,
    tls: Mapping[str, Any],
    listener: socket.socket,
    traces: Traces | None,
) -> int:
    """Load the engine and serve until a signal comes or the engine ends."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    model = target.model
    engine_config = config.engine_config()
    tokenizer: Tokenizer | None = None
    if model.artifact_id is None:  # where answers end may not lie in the folder
        tokenizer = await asyncio.to_thread(open_tokenizer, target)
        engine_config = dataclasses.replace(engine_config, end_ids=tokenizer.eos_token_ids)
    goldens, why_not = choose_goldens(target, config)
    client = EngineClient(
        target.folder,
        engine_config,
        verify=model.artifact_id is not None,
        artifact_id=model.artifact_id,
        goldens=goldens,
        waived=model.waiver is not None,
    )
    warn_unmeasured(target, config)
    print(f"loading {target.folder}", file=sys.stderr)
    try:
        loading = asyncio.create_task(client.start())
        if tokenizer is None:
            tokenizer = await asyncio.to_thread(open_tokenizer, target)
        if not await first_of(loading, stop):
            return 0
        print(f"self-test {client.self_test or f'skipped: {why_not}'}", file=sys.stderr)
        app_config = AppConfig(
            model=model,
            keys=keys,
            cors_origins=config.cors_origins,
            max_body_bytes=config.max_body_bytes,
            body_timeout=config.body_timeout,
            max_requests=config.max_requests,
            request_timeout=config.request_timeout,
            session_timeout=config.session_timeout,
            max_sessions=config.max_sessions,
            access_log=sys.stderr if config.access_log == "json" else None,
            traces=traces,
        )
        app = create_app(client, tokenizer, app_config)
        connection = connection_class(config.head_timeout, app.state.metrics.refused)
        options = {"http": connection, "log_config": LOG, "access_log": config.access_log == "text", **tls}
        server = Server(uvicorn.Config(app, timeout_graceful_shutdown=SECONDS_TO_FINISH, **options))
        gc.collect()
        gc.freeze()  # what is there now stays, and no collection amid requests looks at it again
        listener.listen(2048)  # whoever reads the URL can connect
        announce(target, client, listener, num_keys=len(keys), scheme="https" if tls else "http")
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ending = asyncio.create_task(client.wait_ended())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        at_once = False
        if stop.is_set() and not client.error:
            at_once = await drain(app.state.admission, stop, ending, seconds=config.drain_timeout)
        failed = client.error
        if at_once:
            await client.close()  # what runs is told so, and its connections end
        server.should_exit = True
        await serving
        for task in (ending, stopping):
            task.cancel()
        return fail(str(failed)) if failed else 0
    except EngineError as error:
        return fail(str(error))
    finally:
        await client.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


async def drain(admission: Admission, stop: asyncio.Event, ending: asyncio.Task[None], *, seconds: float) -> bool:
    """Let nobody in and wait until running requests have ended: for `seconds`, and no longer than to a second signal,
    when it returns True, or the end of the engine. The server answers meanwhile, that it is not ready."""
    stop.clear()
    if admission.held:
        print(
            f"ending: {admission.held} running requests have {seconds:g} s; a second signal ends at once",
            file=sys.stderr,
        )
    drained, again = asyncio.create_task(admission.drained()), asyncio.create_task(stop.wait())
    await asyncio.wait({drained, again, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in (drained, again):
        task.cancel()
    return stop.is_set()


def warn_unmeasured(target: Target, config: ServeConfig) -> None:
    """Say which options an artifact was evaluated without, so that its verdict is not taken for theirs."""
    if target.model.artifact_id is not None and config.unmeasured:
        names = ", ".join(f"serve.{name}" for name in config.unmeasured)
        print(f"UNMEASURED {names}: the artifact was evaluated without", file=sys.stderr)


async def first_of(loading: asyncio.Task[None], stop: asyncio.Event) -> bool:
    """True once `loading` is done, with its error raised; False, and it cancelled, if `stop` is set first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not loading.done():
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        return False
    await loading
    return True


def announce(target: Target, client: EngineClient, listener: socket.socket, *, num_keys: int, scheme: str) -> None:
    host, port = listener.getsockname()[:2]
    model = target.model
    verdict = model.verdict or "not evaluated"
    print(f"model    {model.name} ({model.recipe or 'unverified folder'}, session_len {client.session_len})")
    print(f"artifact {model.artifact_id or 'none'} ({verdict}{', waiver: ' + model.waiver if model.waiver else ''})")
    which = "asked for on every route" if num_keys == 1 else f"one of {num_keys}, asked for on every route"
    print(f"key      {which if num_keys else 'none: this machine alone can connect'}")
    print(f"URL      {scheme}://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


class Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: it would raise the signal again and end before the engine does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


LOG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "uvicorn.access": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}
