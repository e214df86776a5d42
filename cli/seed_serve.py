"""LMDeploy's commands that serve and chat, as doors to ours.

    ingot serve api_server FOLDER [--server-name 127.0.0.1 --server-port 23333 --instance-num 64 --tp 1]
    ingot serve api_client URL [SESSION_ID]
    ingot serve gradio URL|FOLDER [--server-name 127.0.0.1 --server-port 6006]
    ingot chat turbomind FOLDER [--request-output-len 512 --stream-output True --meta-instruction TEXT]
    ingot chat torch FOLDER [--max-new-tokens 128 --temperature 0.8 --top-p 0.95 --seed 0]

FOLDER is a workspace, or a checkpoint, which is converted into a temporary one. Flags are written with hyphens or
underscores; one that is not known is an error.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from cli.arguments import Parser
from cli.chat import LocalPartner, Partner, converse, key_asked_for
from cli.key_files import first_key
from cli.seed import parse_flags, switch
from cli.seed_flags import log_level, origins, refuse
from cli.target import CONFIG_INI, find_target
from engine.config import EngineConfig
from server.client import Client, Message, Params

WORDS = {"exit": "/exit", "end": "/reset"}
TP = "GPUs, or processes on the CPU, that compute together, whatever tp FOLDER is of (1)"
ENGINE_KEYS = (
    *("session-len", "cache-max-entry-count", "cache-block-seq-len", "num-tokens-per-iter"),
    *("quant-policy", "rope-scaling-factor", "use-logn-attn", "max-position-embeddings"),
)
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
    parser.add_argument("--allow-origins", type=origins, metavar="URLS", help="serve.cors_origins: * or https://a,...")
    parser.add_argument("--log-level", type=log_level, metavar="LEVEL", help="above INFO, no line for every request")
    for name in ENGINE_KEYS:
        parser.add_argument(f"--{name}", metavar="X", help=f"serve.{name.replace('-', '_')}")
    refuse(parser, "allow-credentials", "allow-methods", "allow-headers")
    options = parse_flags(parser, argv)
    from cli import serve

    said = {
        "host": options.server_name,
        "port": options.server_port,
        "model_name": options.model_name,
        "max_batch_size": options.instance_num,
        "api_key_file": options.api_key_file,
        "cors_origins": options.allow_origins,
        "access_log": options.log_level,
        **{name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in ENGINE_KEYS},
        "tp": options.tp,
    }
    with terminated_as_exit(), workspace_of(options.folder) as folder:
        given = [f"serve.{name}={value}" for name, value in said.items() if value is not None]
        return serve.main([f"folder={folder}", *given])


def api_client(argv: list[str]) -> int:
    parser = Parser(prog="ingot serve api_client", description="talk to a server in the terminal", allow_abbrev=False)
    parser.add_argument("url", metavar="URL", help="of the server: http://127.0.0.1:23333")
    parser.add_argument("session_id", nargs="?", type=int, default=0, metavar="ID", help="which of your sessions (0)")
    parser.add_argument("--api-key-file", metavar="FILE", help="a file with the server's key; or INGOT_API_KEY")
    options = parse_flags(parser, argv)
    with Client(options.url, api_key=first_key(options.api_key_file)) as client:
        with key_asked_for(options.url):
            client.models()  # a server that is not there is said before a message is typed
        print("double enter to end input; `end` ends the session, `exit` the program", flush=True)
        converse(SessionPartner(client, options.session_id), words=WORDS)
    return 0


def gradio(argv: list[str]) -> int:
    parser = Parser(prog="ingot serve gradio", description="a page to chat in the browser", allow_abbrev=False)
    parser.add_argument("source", metavar="URL|FOLDER", help="a server, or a folder, for which one is started")
    parser.add_argument("model_name", nargs="?", metavar="NAME", help="what the model of a FOLDER is called")
    parser.add_argument("--server-name", default="127.0.0.1", metavar="HOST", help="of the page (127.0.0.1)")
    parser.add_argument("--server-port", type=int, default=6006, metavar="N", help="of the page (6006)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="most answers at once of a FOLDER (32)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help=TP)
    switch(parser, "--restful-api", "accepted: URL or FOLDER says which it is")
    options = parse_flags(parser, argv)
    from cli.web import serve_page

    if options.source.startswith(("http://", "https://")):
        if options.model_name is not None:
            raise ValueError(f"NAME goes with a FOLDER; {options.source} is a server, whose models have names.")
        return serve_page(options.source, options.server_name, options.server_port)
    with (
        terminated_as_exit(),
        workspace_of(Path(options.source)) as folder,
        background_server(folder, options.batch_size, options.tp, options.model_name) as url,
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
    switch(parser, "--stream-output", "False: an answer is shown when it is whole", default=True)
    parser.add_argument("--meta-instruction", "--system", default="", metavar="TEXT", help="the system prompt")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("repetition-penalty", float)):
        default = getattr(SAMPLING, name.replace("-", "_"))
        shown = "off" if default is None else default
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"({shown})")
    parser.add_argument("--session-len", type=int, metavar="N", help="most tokens of a conversation")
    options = parse_flags(parser, argv)
    if options.cap != "chat":
        raise ValueError(
            f"--cap {options.cap}: only chat is a dialogue; `ingot generate folder=F PROMPT` completes text."
        )
    params = Params(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        max_tokens=options.request_output_len,
    )
    engine = EngineConfig(tp=options.tp, session_len=options.session_len or 0)
    return _chat(options.folder, params, engine, system=options.meta_instruction, stream=options.stream_output)


def chat_torch(argv: list[str]) -> int:
    parser = Parser(prog="ingot chat torch", description="talk to a checkpoint in the terminal", allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a checkpoint, quantized or not; or a workspace")
    parser.add_argument("--tokenizer-path", type=Path, metavar="P", help="another tokenizer: its file or its folder")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(128)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="(0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(0.95)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument("--max-session-len", type=int, metavar="N", help="most tokens of a conversation")
    switch(parser, "--use-fast-tokenizer", "accepted: both kinds give the same ids, and what the folder has is read")
    refuse(parser, "accel", "adapter", "debug", "log-file", "max-alloc")
    options = parse_flags(parser, argv)
    params = Params(
        temperature=options.temperature, top_p=options.top_p, seed=options.seed, max_tokens=options.max_new_tokens
    )
    engine = EngineConfig(session_len=options.max_session_len or 0)
    return _chat(options.folder, params, engine, tokenizer=options.tokenizer_path)


def _chat(
    source: Path,
    params: Params,
    engine: EngineConfig,
    *,
    tokenizer: Path | None = None,
    system: str = "",
    stream: bool = True,
) -> int:
    with terminated_as_exit(), workspace_of(source, tokenizer=tokenizer) as folder:
        target = find_target(artifact=None, folder=str(folder), waiver=None, store=None)
        partner: Partner = LocalPartner(target, params, engine)
        print("double enter to end input; `end` ends the session, `exit` the program", flush=True)
        converse(partner if stream else WholePartner(partner), system=system, words=WORDS)
    return 0


class WholePartner(Partner):
    """Says what another says, when that is whole."""

    def __init__(self, partner: Partner) -> None:
        self._partner = partner
        self.params = partner.params

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        self._partner.params = self.params
        with contextlib.closing(self._partner.answer(messages)) as pieces:
            yield "".join(pieces)

    def forget(self) -> None:
        self._partner.forget()


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
    """SIGTERM, and SIGHUP of a terminal that closes, unwind the stack, so that what was started or written for the run
    is ended and removed too. uvicorn raises SIGTERM again when it has ended."""
    before = {
        number: signal.signal(number, lambda number, frame: sys.exit(0)) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def background_server(folder: Path, batch_size: int, tp: int, name: str | None) -> Iterator[str]:
    """A server on a free port of loopback, for as long as this lasts: its URL. A key comes from INGOT_API_KEY."""
    command = [sys.executable, "-m", "cli.main", "serve", f"folder={folder}", "serve.port=0"]
    command += [f"serve.max_batch_size={batch_size}", f"serve.tp={tp}"]
    command += [] if name is None else [f"serve.model_name={name}"]
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
