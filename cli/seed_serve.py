"""LMDeploy's commands that serve and chat, as doors to ours.

    ingot serve api_server FOLDER [--server-name 127.0.0.1 --server-port 23333 --instance-num 64 --tp 1]
    ingot serve api_client URL [SESSION_ID]
    ingot serve gradio URL|FOLDER [--server-name 127.0.0.1 --server-port 6006]
    ingot chat turbomind FOLDER [--request-output-len 512]
    ingot chat torch FOLDER [--max-new-tokens 128 --temperature 0.8 --top-p 0.95 --seed 0]

FOLDER is a workspace, or a checkpoint, which is converted into a temporary one. Flags are written with hyphens or
underscores; one that is not known is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from cli.arguments import Parser
from cli.chat import LocalPartner, Partner, converse, read_api_key
from cli.seed import parse_flags, switch
from cli.target import CONFIG_INI, find_target
from server.client import Client, Message, Params

WORDS = {"exit": "/exit", "end": "/reset"}
TP = "GPUs, or processes on the CPU, that compute together, whatever tp FOLDER is of (1)"
SAMPLING = Params(temperature=0.8, top_p=0.8, top_k=40, max_tokens=512)


def api_server(argv: list[str]) -> int:
    parser = Parser(prog="ingot serve api_server", description="a folder over HTTP", allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a workspace, or a checkpoint")
    parser.add_argument("model_name", nargs="?", metavar="NAME", help="what the model is called")
    parser.add_argument("--server-name", default="127.0.0.1", metavar="HOST", help="(127.0.0.1); others need a key")
    parser.add_argument("--server-port", type=int, default=23333, metavar="N", help="(23333)")
    parser.add_argument("--instance-num", type=int, metavar="N", help="most answers at once: serve.max_batch_size")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help=TP)
    parser.add_argument("--api-key-file", metavar="FILE", help="a file with the key; or INGOT_API_KEY")
    for name in ("session-len", "cache-max-entry-count", "quant-policy", "rope-scaling-factor"):
        parser.add_argument(f"--{name}", metavar="X", help=f"serve.{name.replace('-', '_')}")
    options = parse_flags(parser, argv)
    from cli import serve

    said = {
        "host": options.server_name,
        "port": options.server_port,
        "model_name": options.model_name,
        "max_batch_size": options.instance_num,
        "api_key_file": options.api_key_file,
        "session_len": options.session_len,
        "cache_max_entry_count": options.cache_max_entry_count,
        "quant_policy": options.quant_policy,
        "rope_scaling_factor": options.rope_scaling_factor,
        "tp": options.tp,
    }
    with workspace_of(options.folder) as folder:
        given = [f"serve.{name}={value}" for name, value in said.items() if value is not None]
        return serve.main([f"folder={folder}", *given])


def api_client(argv: list[str]) -> int:
    parser = Parser(prog="ingot serve api_client", description="talk to a server in the terminal", allow_abbrev=False)
    parser.add_argument("url", metavar="URL", help="of the server: http://127.0.0.1:23333")
    parser.add_argument("session_id", nargs="?", type=int, default=0, metavar="ID", help="which of your sessions (0)")
    parser.add_argument("--api-key-file", metavar="FILE", help="a file with the server's key; or INGOT_API_KEY")
    options = parse_flags(parser, argv)
    with Client(options.url, api_key=read_api_key(options.api_key_file)) as client:
        client.models()  # a server that is not there is said before a message is typed
        print("double enter to end input; `end` ends the session, `exit` the program", flush=True)
        converse(SessionPartner(client, options.session_id), words=WORDS)
    return 0


def gradio(argv: list[str]) -> int:
    parser = Parser(prog="ingot serve gradio", description="a page to chat in the browser", allow_abbrev=False)
    parser.add_argument("source", metavar="URL|FOLDER", help="a server, or a folder, for which one is started")
    parser.add_argument("--server-name", default="127.0.0.1", metavar="HOST", help="of the page (127.0.0.1)")
    parser.add_argument("--server-port", type=int, default=6006, metavar="N", help="of the page (6006)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="most answers at once of a FOLDER (32)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help=TP)
    switch(parser, "--restful-api", "accepted: URL or FOLDER says which it is")
    options = parse_flags(parser, argv)
    from cli.web import serve_page

    if options.source.startswith(("http://", "https://")):
        return serve_page(options.source, options.server_name, options.server_port)
    with (
        terminated_as_exit(),
        workspace_of(Path(options.source)) as folder,
        background_server(folder, options.batch_size, options.tp) as url,
    ):
        return serve_page(url, options.server_name, options.server_port)


def chat_turbomind(argv: list[str]) -> int:
    parser = Parser(prog="ingot chat turbomind", description="talk to a folder in the terminal", allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a workspace, or a checkpoint")
    parser.add_argument(
        "session_id", nargs="?", type=int, default=1, metavar="ID", help="accepted: there is one session"
    )
    parser.add_argument("--cap", default="chat", metavar="chat", help="the rest is `ingot generate`")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help=TP)
    parser.add_argument("--request-output-len", type=int, default=512, metavar="N", help="most tokens (512)")
    options = parse_flags(parser, argv)
    if options.cap != "chat":
        raise ValueError(
            f"--cap {options.cap}: only chat is a dialogue; `ingot generate folder=F PROMPT` completes text."
        )
    return _chat(options.folder, dataclasses.replace(SAMPLING, max_tokens=options.request_output_len), tp=options.tp)


def chat_torch(argv: list[str]) -> int:
    parser = Parser(prog="ingot chat torch", description="talk to a checkpoint in the terminal", allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a checkpoint, quantized or not; or a workspace")
    parser.add_argument("--tokenizer-path", type=Path, metavar="P", help="another tokenizer: its file or its folder")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(128)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="(0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(0.95)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    options = parse_flags(parser, argv)
    params = Params(
        temperature=options.temperature, top_p=options.top_p, seed=options.seed, max_tokens=options.max_new_tokens
    )
    return _chat(options.folder, params, tokenizer=options.tokenizer_path)


def _chat(source: Path, params: Params, *, tokenizer: Path | None = None, tp: int = 1) -> int:
    with workspace_of(source, tokenizer=tokenizer) as folder:
        partner = LocalPartner(find_target(artifact=None, folder=str(folder), waiver=None, store=None), params, tp=tp)
        print("double enter to end input; `end` ends the session, `exit` the program", flush=True)
        converse(partner, words=WORDS)
    return 0


class SessionPartner(Partner):
    """A session that the server keeps: of a conversation, only what is new is sent."""

    def __init__(self, client: Client, session_id: int) -> None:
        self._client = client
        self._session_id = session_id
        self.params: Params = SAMPLING

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        begun = any(message["role"] == "assistant" for message in messages)
        options = self.params.given()
        options |= {"request_output_len": options.pop("max_tokens", None)}
        said = messages[-1:] if begun else messages
        with contextlib.closing(self._client.interactive(self._session_id, said, **options)) as answer:
            yield from answer

    def forget(self) -> None:
        self._client.end_session(self._session_id)


@contextlib.contextmanager
def workspace_of(source: Path, *, tokenizer: Path | None = None) -> Iterator[Path]:
    """The workspace itself, or one that a checkpoint is converted into for as long as this lasts."""
    if (source / CONFIG_INI).is_file():
        if tokenizer is not None:
            raise ValueError(f"--tokenizer-path goes with a checkpoint; {source} is a workspace and has its own.")
        yield source
        return
    if not any((source / name).is_file() for name in ("config.json", "params.json")):
        raise ValueError(f"{source} is neither a workspace (it has no {CONFIG_INI}) nor a checkpoint (no config.json).")
    from pipelines.convert import Conversion, convert

    with tempfile.TemporaryDirectory(prefix="ingot-") as scratch:
        target = Path(scratch) / "workspace"
        print(f"converting {source} for this run; `ingot convert` keeps what it makes", file=sys.stderr)
        name = source.resolve().name
        convert(Conversion(name=name, source=source, target=target, tokenizer=tokenizer))
        yield target


@contextlib.contextmanager
def terminated_as_exit() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that what was started is ended too. uvicorn raises it again when it has ended."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def background_server(folder: Path, batch_size: int, tp: int) -> Iterator[str]:
    """A server on a free port of loopback, for as long as this lasts: its URL. A key comes from INGOT_API_KEY."""
    command = [sys.executable, "-m", "cli.main", "serve", f"folder={folder}", "serve.port=0"]
    command += [f"serve.max_batch_size={batch_size}", f"serve.tp={tp}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next((line.split()[1] for line in lines if line.startswith("URL")), None)
        if url is None:
            raise ValueError(f"the server for {folder} did not start; it says why above.")
        yield url
    finally:
        process.terminate()
        process.wait()
