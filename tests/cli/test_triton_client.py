"""The client against a gRPC service in this process, over the real three models: no Triton server runs here."""

import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli import triton_client
from cli.main import main
from cli.triton_client import Connection, TritonPartner, common_length
from engine.storage.workspace import TOKENIZER
from tests.tiny_artifact import write_tiny_artifact

grpc = pytest.importorskip("grpc", reason="tritonclient is not installed: pip install 'tritonclient[grpc]'")
from tritonclient.grpc import service_pb2_grpc

from tests.triton_stand_in import Service, Triton

SHORT = {"request_output_len": ("UINT32", 8), "temperature": ("FP32", 0.0)}
LONG = {"request_output_len": ("UINT32", 90), "temperature": ("FP32", 0.0)}


class Recording(Service):
    """Keeps what the engine's model was asked."""

    def __init__(self, triton):
        super().__init__(triton)
        self.asked = []
        infer = triton.models["turbomind"].infer

        def recording(arrays, on_response):
            self.asked.append({name: values.ravel().tolist() for name, values in arrays.items()})
            return infer(arrays, on_response)

        triton.models["turbomind"].infer = recording


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path)
    return path


def serving(folder):
    """(address, service), until the generator is closed."""
    with Triton(folder / "model_repository") as triton:
        service = Recording(triton)
        server = grpc.server(ThreadPoolExecutor(max_workers=4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", service
        server.stop(grace=None).wait()


@pytest.fixture(scope="module")
def served(folder):
    yield from serving(folder)


@pytest.fixture
def asked(served):
    served[1].asked.clear()
    return served[1].asked


@pytest.fixture
def connection(served):
    with Connection(served[0]) as connection:
        yield connection


def partner(connection, *, session=5, is_chat=True, sampling=SHORT):
    return TritonPartner(connection, session=session, is_chat=is_chat, sampling=sampling)


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_is_one_session(connection, asked):
    talking = partner(connection)
    messages = [user("the cat")]
    messages += [{"role": "assistant", "content": "".join(talking.answer(messages))}, user("the dog")]
    again = "".join(talking.answer(messages))
    assert again
    assert [request["START"] for request in asked] == [[1], [0]]
    first, second = asked
    prompt = connection.infer("preprocessing", talking_inputs(connection, messages), "INPUT_ID").ravel().tolist()
    kept = second["step"][0]
    assert kept > len(first["input_ids"]) // 2
    assert prompt == [*first["input_ids"], *prompt[len(first["input_ids"]) :]]
    assert second["input_ids"] == prompt[kept:]
    # The same as a session that is told everything at once.
    assert "".join(partner(connection, session=6).answer(messages)) == again
    talking.end()
    assert asked[-1]["END"] == [1] and asked[-1]["CORRID"] == [5]
    assert 5 not in sessions_of(connection)


def talking_inputs(connection, messages):
    import numpy as np

    query = np.array([[json.dumps(messages).encode()]], dtype=np.object_)
    return [connection.tensor("QUERY", "BYTES", query), connection.scalar("CHAT", "INT32", 1)]


def sessions_of(connection):
    """What ending an unknown session shows: nothing but that it is unknown."""
    known = set()
    for session in (5,):
        talking = partner(connection, session=session)
        request = talking._request([], START=("INT32", 0), request_output_len=("UINT32", 0))
        try:
            known |= {session for _ in connection.round(request, [])}
        except ValueError as error:
            assert "no session 5" in str(error)
    return known


def test_an_answer_that_is_left_is_stopped(connection, asked):
    talking = partner(connection, session=7, sampling=LONG)
    answer = talking.answer([user("the cat")])
    next(answer)
    answer.close()
    # The tiny model may have ended by itself before.
    assert "STOP" in asked[-1] or len(asked) == 1
    assert "".join(talking.answer([user("the cat"), user("the dog")])) is not None
    assert asked[-1]["START"] == [0]


def test_pieces_are_whole_characters_and_add_up(connection):
    pieces = list(partner(connection, session=8, sampling=LONG).answer([user("the cat in the rain")]))
    assert len(pieces) > 1 and "".join(pieces)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_a_refused_round_begins_anew(connection, asked):
    talking = partner(connection, session=9)
    "".join(talking.answer([user("the cat")]))
    with pytest.raises(ValueError, match="session_len is 128"):
        list(talking.answer([user("the cat " * 200)]))
    "".join(talking.answer([user("the cat")]))
    assert asked[-1]["START"] == [1]


def typed(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_the_command(served, asked, monkeypatch, capsys):
    typed(monkeypatch, "the cat\n\nthe dog\n\n/reset\nthe rain\n\n/exit\n")
    options = ["--max-tokens", "5", "--temperature", "0", "--top-k", "1"]
    assert main(["serve", "triton_client", served[0], "12", *options]) == 0
    assert capsys.readouterr().out.startswith("session 12.")
    assert [request.get("START") for request in asked] == [[1], [0], [0], [1]]
    assert {request["CORRID"][0] for request in asked} == {12}
    assert asked[0]["request_output_len"] == [5] and asked[0]["runtime_top_k"] == [1]
    assert asked[-1]["END"] == [1]


def test_a_model_without_a_template_completes(tmp_path, monkeypatch, capsys):
    write_tiny_artifact(tmp_path / "tiny", chat_template=None)
    for address, service in serving(tmp_path / "tiny"):
        typed(monkeypatch, "the cat\n\n/exit\n")
        assert main(["serve", "triton_client", address, "--session-id", "3"]) == 0
        assert "no chat template" in (shown := capsys.readouterr().out) and "--cap completion" in shown
        assert service.asked == []
        typed(monkeypatch, "the cat\n\non the\n\n/exit\n")
        assert main(["serve", "triton_client", address, "--cap", "completion", "--max-tokens", "3"]) == 0
        assert len(service.asked) == 3 and len(service.asked[1]["input_ids"]) < len(service.asked[0]["input_ids"]) + 6


def test_a_server_that_lacks_a_model(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "tiny")
    for address, service in serving(tmp_path / "tiny"):
        del service.triton.models["postprocessing"]
        assert main(["serve", "triton_client", address]) == 1
        assert "has no model postprocessing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://localhost:1"], "without http://"),
        (["localhost"], "is not an address"),
        (["127.0.0.1:1"], "no Triton server answers at 127.0.0.1:1"),
        (["127.0.0.1:1", "-5"], "-5"),
        (["127.0.0.1:1", "--max-tokens", "0"], "at least 1"),
        (["127.0.0.1:1", "--wibble"], "--wibble"),
        ([], "HOST:PORT"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message, capsys):
    assert main(["serve", "triton_client", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_without_tritonclient(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    assert main(["serve", "triton_client", "127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "tritonclient" in said and "extra `triton`" in said and said.count("\n") == 1


def test_common_length():
    assert [common_length([1, 2, 3], other) for other in ([1, 2, 4], [1, 2], [], [1, 2, 3, 4])] == [2, 2, 0, 3]
