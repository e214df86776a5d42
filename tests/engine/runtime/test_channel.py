import socket
import threading

import pytest

from engine.runtime.channel import HEADER, LARGEST, Channel, content_length, pack, unpack

MESSAGES = [{"type": "add", "ids": (1, 2**40), "text": "你好"}, {"type": "x", "none": None, "long": "y" * 10**6}]


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def test_messages_come_whole_and_in_order_however_they_are_cut(ends):
    channel, theirs = ends
    raw = b"".join(map(pack, [MESSAGES[0]] * 3))
    found = []
    for place in range(0, len(raw), 7):
        theirs.sendall(raw[place : place + 7])
        found += channel.receive(wait=False)
    assert found == [MESSAGES[0]] * 3
    assert channel.receive(wait=False) == []


def test_a_message_larger_than_what_a_socket_holds(ends):
    channel, theirs = ends
    sender = threading.Thread(target=lambda: theirs.sendall(pack(MESSAGES[1]) + pack(MESSAGES[0])))
    sender.start()
    found = channel.receive(wait=True)
    sender.join()
    assert (found + channel.receive(wait=False)) == [MESSAGES[1], MESSAGES[0]]


def test_what_is_sent_is_what_pack_says(ends):
    channel, theirs = ends
    channel.send(MESSAGES[0])
    header = theirs.recv(HEADER)
    assert unpack(theirs.recv(content_length(header))) == MESSAGES[0]


def test_the_end_of_the_other_side_is_an_error(ends):
    channel, theirs = ends
    theirs.sendall(pack(MESSAGES[0]) + b"\0\0")
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="closed the channel"):
        channel.receive(wait=True)


def test_a_length_beyond_the_largest_is_refused_before_it_is_waited_for(monkeypatch):
    assert content_length(LARGEST.to_bytes(HEADER, "big")) == LARGEST
    with pytest.raises(ValueError, match=f"{LARGEST + 1} bytes from the engine"):
        content_length((LARGEST + 1).to_bytes(HEADER, "big"))
    with pytest.raises(ValueError, match="above the"):
        monkeypatch.setattr("engine.runtime.channel.LARGEST", 100)
        pack({"text": "x" * 100})
