import json

import pytest

from benchmarks import http_client
from benchmarks.http_client import Address, address_of, get


def event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


TEXT = event(choices=[{"text": "a b", "finish_reason": None}])
EMPTY = event(choices=[{"text": "", "finish_reason": "length"}])
USAGE = event(choices=[], usage={"completion_tokens": 7})


def test_pieces_are_events_with_text_however_they_were_cut() -> None:
    whole = TEXT + TEXT + EMPTY + USAGE + b"data: [DONE]\n\n"
    answer = http_client._read(0.5, [(1.0, whole[:10]), (2.0, whole[10:-20]), (3.0, whole[-20:])])
    assert (answer.asked, answer.pieces, answer.ended, answer.tokens) == (0.5, (2.0, 2.0), 3.0, 7)
    chat = event(choices=[{"delta": {"content": "x"}}]) + event(choices=[{"delta": {"role": "assistant"}}])
    assert http_client._read(0.0, [(1.0, chat), (2.0, USAGE)]).pieces == (1.0,)


def test_a_stream_without_text_or_with_an_error_is_refused() -> None:
    with pytest.raises(ValueError, match="without text or without its usage"):
        http_client._read(0.0, [(1.0, TEXT)])
    with pytest.raises(ValueError, match="ended a stream: no more"):
        http_client._read(0.0, [(1.0, event(error={"message": "no more"}))])


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def received(*pieces: bytes) -> http_client.Streamed:
    times = [1.0 + number for number in range(len(pieces))]
    return http_client.Streamed(0.5, times, list(pieces))


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def test_a_piece_has_come_with_its_last_byte() -> None:
    first, second, end = chunk(TEXT), chunk(TEXT), chunk(USAGE) + b"0\r\n\r\n"
    answer = received(HEAD + first[:-2], first[-2:] + second[:-3], second[-3:] + end).answered()
    assert (answer.asked, answer.pieces, answer.ended, answer.tokens) == (0.5, (1.0, 3.0), 3.0, 7)
    for size in (1, 3, 1000):
        whole = HEAD + first + second + end
        answer = received(*(whole[at : at + size] for at in range(0, len(whole), size))).answered()
        assert (len(answer.pieces), answer.tokens) == (2, 7)


@pytest.mark.parametrize("cut", [3, 4, 6, 30, 130])
def test_a_stream_that_breaks_off_is_refused(cut: int) -> None:
    whole = HEAD + chunk(TEXT) + chunk(USAGE) + b"0\r\n\r\n"
    with pytest.raises(ValueError, match="broke off"):
        received(whole[:-cut]).answered()
    with pytest.raises(ValueError, match="answered 0: no JSON came"):
        received().answered()
    with pytest.raises(ValueError, match="answered 400: too much"):
        received(b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {"message": "too much"}}').answered()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:23333", Address("127.0.0.1", 23333, "")),
        ("localhost:80", Address("localhost", 80, "")),
        ("http://[::1]:5/v1/", Address("::1", 5, "")),
        ("http://host:1/prefix/v1", Address("host", 1, "/prefix")),
    ],
)
def test_addresses(url: str, expected: Address) -> None:
    assert address_of(url) == expected


@pytest.mark.parametrize("url", ["https://host:1", "http://", "http://host:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="is not understood: write http://HOST:PORT"):
        address_of(url)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no server answers"):
        get(Address("127.0.0.1", 9, ""), "/v1/models")
