import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict

import pytest

from engine.config import EngineConfig, Sampling
from engine.runtime.channel import HEADER, LARGEST, Channel, content_length, pack, unpack
from engine.runtime.event import Event
from engine.runtime.process import Service, load
from engine.storage import artifacts
from engine.storage.workspace import WEIGHTS
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_arrive_whole_however_they_are_cut(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    channel = Channel(theirs)
    assert channel.receive(wait=False) == []
    messages = [{"type": "add", "prompt_ids": tuple(range(count)), "text": "é😀"} for count in (0, 5, 3000)]
    content = b"".join(pack(message) for message in messages)
    received = []
    for start in range(0, len(content), 777):
        ours.sendall(content[start : start + 777])
        received += channel.receive(wait=False)
    assert received == messages
    ours.close()
    with pytest.raises(EOFError):
        channel.receive(wait=True)


def test_waiting_sleeps_until_a_message_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    content = pack({"type": "state"})

    def in_two_pieces() -> None:
        ours.sendall(content[:3])
        ours.sendall(content[3:])

    timer = threading.Timer(0.1, in_two_pieces)
    timer.start()
    assert Channel(theirs).receive(wait=True) == [{"type": "state"}]
    timer.join()


def test_a_length_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="above"):
        content_length((LARGEST + 1).to_bytes(HEADER, "big"))
    assert unpack(pack({"a": 1})[HEADER:]) == {"a": 1}


class FakeEngine:
    """Answers every request with one event per step, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.open: list[str] = []
        self.session_len = 10

    def add(self, prompt_ids: list[int], sampling: Sampling, *, request_id: str, owner: str, priority: int) -> str:
        self.calls.append(("add", prompt_ids, sampling, owner, priority))
        if not prompt_ids:
            raise ValueError("no prompt")
        self.open.append(request_id)
        return request_id

    def abort(self, request_id: str) -> None:
        self.calls.append(("abort", request_id))
        self.open.remove(request_id)

    def check(self) -> None:
        self.calls.append(("check",))

    def has_work(self) -> bool:
        return bool(self.open)

    def step(self) -> list[Event]:
        request_id = self.open.pop(0)
        counts = {"prompt_tokens": 2, "cached_tokens": 1, "completion_tokens": 1}
        return [Event(request_id=request_id, token_ids=(7,), text="x", finish_reason="length", **counts)]


def run_until_closed(engine: FakeEngine, channel: Channel) -> None:
    with pytest.raises(EOFError):
        Service(engine, channel).run()  # type: ignore[arg-type]


def test_the_service_answers_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    engine = FakeEngine()
    sampling = {"max_new_tokens": 3, "stop": ["a", "b"]}
    for message in (
        {"type": "add", "request_id": "r1", "prompt_ids": [1, 2], "sampling": sampling, "owner": "me", "priority": 3},
        {"type": "add", "request_id": "r2", "prompt_ids": [], "sampling": sampling},
        {"type": "add", "request_id": "r3", "prompt_ids": [3], "sampling": sampling},
        {"type": "abort", "request_id": "r3"},
        {"type": "state"},
    ):
        ours.sendall(pack(message))
    service = threading.Thread(target=run_until_closed, args=(engine, Channel(theirs)))
    service.start()
    answers = []
    while len(answers) < 5:
        answers += Channel(ours).receive(wait=True)
    ours.close()
    service.join()
    assert [answer["type"] for answer in answers] == ["accepted", "refused", "accepted", "state", "events"]
    assert answers[1]["message"] == "no prompt"
    assert answers[3]["unfinished"] == 1
    assert answers[4]["events"] == (("r1", (7,), "x", "length", 2, 1, 1, (), 0.0),)
    assert ("add", [1, 2], Sampling(max_new_tokens=3, stop=("a", "b")), "me", 3) in engine.calls
    assert ("abort", "r3") in engine.calls


def test_it_ends_at_once_when_its_parent_is_not_the_one_that_it_was_told(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    _, theirs = ends
    command = [sys.executable, "-m", "engine.runtime.process", "--fd", str(theirs.fileno()), "--parent", "1"]
    assert os.getpid() != 1
    assert subprocess.run(command, pass_fds=[theirs.fileno()], timeout=30).returncode == 1


@pytest.fixture
def streaming(monkeypatch):
    """A CPU that is sent weights as a GPU is."""
    monkeypatch.setattr(EngineConfig, "streams_weights", True)


def load_message(folder, artifact_id):
    config = asdict(EngineConfig(max_batch_size=2, cache_max_entry_count=20))
    return {"folder": str(folder), "config": config, "verify": True, "artifact_id": artifact_id}


def test_weights_that_are_streamed_are_hashed_once_and_compute_the_same(tmp_path, monkeypatch):
    artifact_id = write_tiny_artifact(tmp_path)
    answers, hashed = [], []
    hash_file = artifacts.hash_file
    monkeypatch.setattr(
        artifacts, "hash_file", lambda path, **options: hashed.append(path) or hash_file(path, **options)
    )
    for streams in (False, True):
        monkeypatch.setattr(EngineConfig, "streams_weights", streams)
        hashed.clear()
        engine, _ = load(load_message(tmp_path, artifact_id))
        assert any(path.suffix == ".weight" for path in hashed) is not streams
        [answer] = engine.generate([[5, 9, 11]], Sampling(temperature=0, max_new_tokens=6))
        answers.append(answer.token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.1.feed_forward.w2.0.weight", "config.ini"])
def test_streamed_weights_that_have_changed_are_refused(tmp_path, streaming, name):
    artifact_id = write_tiny_artifact(tmp_path)
    path = tmp_path / WEIGHTS / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(artifacts.ArtifactError, match=f"is damaged: .*{name} has changed"):
        load(load_message(tmp_path, artifact_id))


def test_of_an_error_and_damage_the_damage_is_told(tmp_path, streaming):
    artifact_id = write_tiny_artifact(tmp_path)
    (path,) = (tmp_path / WEIGHTS).glob("norm.weight")
    path.write_bytes(b"\xff" * path.stat().st_size)
    message = load_message(tmp_path, artifact_id)
    message["config"]["session_len"] = 1
    with pytest.raises(artifacts.ArtifactError, match=r"norm\.weight has changed"):
        load(message)


def test_who_interrupts_a_load_does_not_wait_until_all_is_hashed(tmp_path, streaming, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    artifact_id = write_tiny_artifact(tmp_path)
    monkeypatch.setattr("engine.runtime.engine.Engine.from_workspace", interrupted)
    monkeypatch.setattr(artifacts, "verify_digests", lambda *arguments: pytest.fail("hashed after the interrupt"))
    with pytest.raises(KeyboardInterrupt):
        load(load_message(tmp_path, artifact_id))
