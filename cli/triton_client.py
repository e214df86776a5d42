"""`ingot serve triton_client HOST:PORT`: a conversation with a Triton server that runs a workspace's model repository.

A message ends with an empty line. /reset forgets the conversation, /exit ends it, Ctrl-C stops an answer.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cli.arguments import Parser
from cli.chat import Partner, converse
from server.client import Message

if TYPE_CHECKING:
    from tritonclient import grpc

MODELS = ("preprocessing", "turbomind", "postprocessing")
SECONDS = 60.0
SECONDS_TO_STOP = 10.0
DTYPES = {"UINT32": np.uint32, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}
UNFINISHED = "\ufffd"
ROUND = "round"
Arrived = queue.Queue[tuple[Any, Any]]


def main(argv: list[str]) -> int:
    parser = Parser(prog="ingot serve triton_client", description=__doc__, allow_abbrev=False)
    parser.add_argument("address", metavar="HOST:PORT", help="Triton's gRPC address")
    parser.add_argument("session", nargs="?", type=session_id, metavar="SESSION_ID", help="default: a random one")
    parser.add_argument("--session-id", "--session_id", dest="named", type=session_id, metavar="SESSION_ID")
    parser.add_argument(
        "--cap",
        choices=("chat", "completion"),
        default="chat",
        help="chat: messages go into the model's chat template; completion: the model goes on with the text",
    )
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--top-p", type=float, default=0.8)
    options = parser.parse_args(argv)
    sampling = {
        "request_output_len": ("UINT32", options.max_tokens),
        "runtime_top_k": ("UINT32", options.top_k),
        "runtime_top_p": ("FP32", options.top_p),
        "temperature": ("FP32", options.temperature),
    }
    if options.max_tokens < 1 or options.top_k < 0:
        raise ValueError("--max-tokens must be at least 1 and --top-k at least 0.")
    asked = options.session if options.named is None else options.named
    session = secrets.randbits(63) if asked is None else asked
    with Connection(options.address) as connection:
        partner = TritonPartner(connection, session=session, is_chat=options.cap == "chat", sampling=sampling)
        print(f"session {session}. An empty line ends a message. /reset forgets the conversation, /exit ends it.")
        try:
            converse(partner)
        finally:
            partner.end()
    return 0


def session_id(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise ValueError(text)
    return value


class TritonPartner(Partner):
    """A session of the server. Each answer is a round that keeps what the session has in common with the messages."""

    def __init__(
        self, connection: Connection, *, session: int, is_chat: bool, sampling: dict[str, tuple[str, float]]
    ) -> None:
        self._connection = connection
        self._session = session
        self._is_chat = is_chat
        self._sampling = sampling
        self._tokens: list[int] | None = None  # what the server's session has; None where that is not known
        self._begun = False

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        prompt = self._encode(messages)
        kept = common_length(prompt, self._tokens or [])
        start, self._tokens, self._begun = self._tokens is None, None, True
        request = self._request(
            prompt[kept:],
            START=("INT32", int(start)),
            step=("INT32", 0 if start else kept),
            **self._sampling,
        )
        shown = ""
        with closing(self._connection.round(request, self._stop_request())) as updates:
            for tokens, final in updates:
                self._tokens = tokens
                text = self._decode(tokens[len(prompt) :])
                if not final:
                    text = text.rstrip(UNFINISHED)
                if text.startswith(shown):
                    piece, shown = text[len(shown) :], text
                    yield piece

    def end(self) -> None:
        """Let the server forget the session. Begun anew and ended at once, it need not know it any more."""
        if self._begun:
            request = self._request([], START=("INT32", 1), END=("INT32", 1), request_output_len=("UINT32", 0))
            for _ in self._connection.round(request, self._stop_request()):
                pass

    def _encode(self, messages: list[Message]) -> list[int]:
        text = json.dumps(messages) if self._is_chat else "".join(message["content"] for message in messages)
        query = np.array([[text.encode()]], dtype=np.object_)
        inputs = [self._connection.tensor("QUERY", "BYTES", query)]
        if self._is_chat:
            inputs.append(self._connection.scalar("CHAT", "INT32", 1))
        try:
            ids: list[int] = self._connection.infer("preprocessing", inputs, "INPUT_ID").ravel().tolist()
        except ValueError as error:
            if self._is_chat and "no chat template" in str(error):
                raise ValueError(f"{error}. `--cap completion` lets it go on with the text.") from error
            raise
        return ids

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        inputs = [
            self._connection.tensor("TOKENS_BATCH", "UINT32", np.array([[ids]], dtype=np.uint32)),
            self._connection.scalar("sequence_length", "UINT32", len(ids)),
        ]
        text: bytes = self._connection.infer("postprocessing", inputs, "OUTPUT").ravel()[0]
        return text.decode()

    def _stop_request(self) -> list[Any]:
        return self._request([], STOP=("INT32", 1), request_output_len=("UINT32", 0))

    def _request(self, ids: list[int], **scalars: tuple[str, float]) -> list[Any]:
        connection = self._connection
        # A tensor of no elements is not sent as one; input_lengths says how many count.
        padded = np.array([ids or [0]], dtype=np.uint32)
        return [
            connection.tensor("input_ids", "UINT32", padded),
            connection.scalar("input_lengths", "UINT32", len(ids)),
            connection.scalar("CORRID", "UINT64", self._session),
            *(connection.scalar(name, kind, value) for name, (kind, value) in scalars.items()),
        ]


class Connection:
    """A gRPC connection to a server with the three models. What goes wrong is a ValueError of one sentence."""

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s/:]+):\d+", address):
            raise ValueError(
                f"{address!r} is not an address: give HOST:PORT of Triton's gRPC service, without http://."
            )
        try:
            from tritonclient import grpc
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the Triton client needs {error.name}, which is not installed: pip install 'tritonclient[grpc]', or "
                "install this project with its extra `triton`."
            ) from error
        self._grpc = grpc
        # No proxy from the environment: this talks to the address that was given and to nobody else.
        self._client: grpc.InferenceServerClient = grpc.InferenceServerClient(
            address, channel_args=[("grpc.enable_http_proxy", 0)]
        )
        with self._complaints(f"no Triton server answers at {address}"):
            missing = [name for name in MODELS if not self._client.is_model_ready(name, client_timeout=SECONDS)]
        if missing:
            raise ValueError(f"the Triton server at {address} has no model {', '.join(missing)} that is ready.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def tensor(self, name: str, kind: str, values: NDArray[Any]) -> grpc.InferInput:
        found = self._grpc.InferInput(name, list(values.shape), kind)
        found.set_data_from_numpy(values)
        return found

    def scalar(self, name: str, kind: str, value: float) -> grpc.InferInput:
        return self.tensor(name, kind, np.array([[value]], dtype=DTYPES[kind]))

    def infer(self, model: str, inputs: list[Any], output: str) -> NDArray[Any]:
        with self._complaints("the server refused this"):
            result = self._client.infer(model, inputs, client_timeout=SECONDS)
        found: NDArray[Any] = result.as_numpy(output)
        return found

    def round(self, request: list[Any], stop: list[Any]) -> Generator[tuple[list[int], bool], None, None]:
        """Sends a request and yields all tokens of the session, and whether they are final, as they come.

        If it is closed before the end, `stop` is sent and the end awaited.
        """
        arrived: Arrived = queue.Queue()
        final = False
        with self._complaints("the connection to the server failed"):
            self._client.start_stream(lambda result, error: arrived.put((result, error)))
        try:
            self._client.async_stream_infer("turbomind", request, request_id=ROUND)
            while not final:
                tokens, final = newest(arrived)
                yield tokens, final
        except (GeneratorExit, KeyboardInterrupt):
            self._client.async_stream_infer("turbomind", stop, request_id="stop")
            while not final:
                _, final = take(arrived, timeout=SECONDS_TO_STOP)
            raise
        finally:
            self._client.stop_stream(cancel_requests=not final)

    @contextmanager
    def _complaints(self, what: str) -> Generator[None, None, None]:
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            raise ValueError(f"{what}: {error.message()}") from error


def newest(arrived: Arrived) -> tuple[list[int], bool]:
    """Waits for an update and takes a later one if several have come."""
    tokens, final = take(arrived, timeout=None)
    while not final and not arrived.empty():
        tokens, final = take(arrived, timeout=None)
    return tokens, final


def take(arrived: Arrived, *, timeout: float | None) -> tuple[list[int], bool]:
    """The tokens of one response, and whether it is the last one of the round."""
    try:
        result, error = arrived.get(timeout=timeout)
    except queue.Empty:
        raise ValueError("the server does not say that it stopped.") from None
    if error is not None:
        raise ValueError(f"the server refused this: {error.message()}")
    response = result.get_response()
    tokens: list[int] = result.as_numpy("output_ids").ravel().tolist()
    return tokens, response.id == ROUND and response.parameters["triton_final_response"].bool_param


def common_length(left: list[int], right: list[int]) -> int:
    """How many ids two lists begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
