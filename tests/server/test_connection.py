"""Clients that take too long, or send too much that is no body, over real sockets."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from server.connection import MOST_BESIDE_BODY, READS_ANY_LENGTH
from tests.server.conftest import CONFIG
from tests.server.running import HEADERS, KEY, Served, serving
from tests.tiny_artifact import write_tiny_artifact

SECONDS = 0.5
LIVE = f"GET /health/live HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
POST = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("impatient")
    artifact = write_tiny_artifact(folder)
    with serving(folder, artifact, CONFIG, head_timeout=SECONDS, body_timeout=SECONDS) as served:
        yield served


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def drip(connection: socket.socket, content: bytes, *, pause: float = 0.1) -> bytes:
    """Send byte after byte until the server ends the connection; what it said."""
    connection.settimeout(pause)
    said = b""
    for byte in content:
        try:
            connection.sendall(bytes([byte]))
            piece = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return said
        if not piece:
            return said
        said += piece
    raise AssertionError(f"the server waited for all of it: {said!r}")


def refused(served: Served, reason: str) -> float:
    lines = httpx.get(f"{served.url}/metrics", headers=HEADERS).text.splitlines()
    found = [line for line in lines if line.startswith("ingot:request_refused_total") and f'"{reason}"' in line]
    return float(found[0].split()[-1]) if found else 0.0


def test_a_head_that_drips_is_ended(impatient: Served) -> None:
    before = refused(impatient, "head_timeout")
    began = time.monotonic()
    with connect(impatient) as connection:
        said = drip(connection, POST)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert SECONDS * 0.8 < time.monotonic() - began < 10
    assert refused(impatient, "head_timeout") == before + 1


def test_a_second_head_that_drips_is_ended(impatient: Served) -> None:
    with connect(impatient) as connection:
        connection.sendall(LIVE)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert drip(connection, POST).startswith(b"HTTP/1.1 408 ")


def test_a_connection_on_which_nothing_comes_ends_without_a_word(impatient: Served) -> None:
    before = refused(impatient, "head_timeout")
    with connect(impatient) as connection:
        assert connection.recv(1 << 16) == b""
    assert refused(impatient, "head_timeout") == before


def test_a_body_that_drips_is_answered_with_408(impatient: Served) -> None:
    before = refused(impatient, "body_timeout")
    with connect(impatient) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        head, _, body = drip(connection, b" " * 1000).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "body_timeout"
    assert refused(impatient, "body_timeout") == before + 1


def test_who_was_refused_does_not_keep_the_connection_with_a_dripping_body(impatient: Served) -> None:
    with connect(impatient) as connection:
        connection.sendall(POST.replace(KEY.encode(), b"wrong") + b"Content-Length: 1000\r\n\r\n")
        assert drip(connection, b" " * 1000).startswith(b"HTTP/1.1 401 ")


def test_no_head_is_waited_for_once_one_came(impatient: Served) -> None:
    with connect(impatient) as connection:
        for _ in range(3):
            connection.sendall(LIVE)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            time.sleep(2 * SECONDS)


@pytest.mark.skipif(not READS_ANY_LENGTH, reason="h11 has a bound of its own")
@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"X-Long: ", b"a" * 1000),
        (b"", b"X-Long: a\r\n" * 100),
        (b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"X-Long: a\r\n" * 100),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"1;a\r\n{\r\n" * 100),
    ],
    ids=["a long header", "many headers", "many trailers", "tiny chunks"],
)
def test_what_is_no_body_is_not_longer_than_it_may_be(impatient: Served, begin: bytes, piece: bytes) -> None:
    before = refused(impatient, "head_too_large")
    with connect(impatient) as connection, contextlib.suppress(ConnectionError):  # reset, over bytes that nobody reads
        connection.sendall(POST + begin)
        for _ in range(8 * MOST_BESIDE_BODY // len(piece)):
            connection.sendall(piece)
        while connection.recv(1 << 16):
            pass
    assert refused(impatient, "head_too_large") == before + 1


def test_a_body_in_chunks_is_taken(impatient: Served) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (BODY[:9], BODY[9:] + b" " * 100_000))
    with connect(impatient) as connection:
        head = POST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + chunks + b"0\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
