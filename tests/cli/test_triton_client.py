"""The client against a gRPC service in this process, over the real three models: no Triton server runs here."""

import io
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cli.main import main
from cli.triton_client import Connection, TritonPartner, common_length
from engine.runtime.tokenizer import Tokenizer
from engine.storage.workspace import TOKENIZER
from tests.tiny_artifact import write_tiny_artifact
from tests.triton_stand_in import Service, Triton, grpc, service_pb2_grpc

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


def test_a_conversation_is_one_session(folder, served, connection, asked):
    talking = partner(connection)
    messages = [user("the cat")]
    messages += [{"role": "assistant", "content": "".join(talking.answer(messages))}, user("the dog")]
    again = "".join(talking.answer(messages))
    assert again
    first, second = asked
    assert (first["START"], second["START"]) == ([1], [0])
    prompt = Tokenizer(folder / TOKENIZER).encode_chat(messages)
    kept = second["step"][0]
    assert kept > len(first["input_ids"]) // 2
    assert prompt == [*first["input_ids"], *prompt[len(first["input_ids"]) :]]
    assert second["input_ids"] == prompt[kept:]
    # The same as a session that is told everything at once.
    assert "".join(partner(connection, session=6).answer(messages)) == again
    talking.end()
    assert asked[-1]["END"] == [1] and asked[-1]["CORRID"] == [5]
    unknown = {
        "input_ids": np.array([[2]], dtype=np.uint32),
        "input_lengths": np.array([[1]], dtype=np.uint32),
        "request_output_len": np.array([[1]], dtype=np.uint32),
        "CORRID": np.array([[5]], dtype=np.uint64),
    }
    [(_, error)] = served[1].triton.infer("turbomind", **unknown)
    assert "no session 5" in error


def test_an_answer_that_is_left_is_stopped(connection, asked):
    talking = partner(connection, session=7, sampling=LONG)
    answer = talking.answer([user("the cat")])
    next(answer)
    answer.close()
    "".join(talking.answer([user("the cat"), user("the dog")]))
    assert asked[-1]["START"] == [0] and asked[-1]["step"][0] >= len(asked[0]["input_ids"]) // 2


def test_an_interrupt_while_waiting_stops_the_round(connection, served, asked, monkeypatch):
    """As Ctrl-C does: it breaks into the waiting, not into what is done with an answer."""
    talking = partner(connection, session=10, sampling=LONG)

    def interrupted(arrived):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cli.triton_client.newest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talking.answer([user("the cat")]))
    assert asked[-1]["STOP"] == [1] and asked[-1]["CORRID"] == [10]
    assert "".join(talking.answer([user("the cat")]))


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
        typed(monkeypatch, "the cat\n\n/exit\n")
        assert main(["serve", "triton_client", address, "--cap", "completion", "--max-tokens", "3"]) == 0
        tokenizer = Tokenizer(tmp_path / "tiny" / TOKENIZER)
        assert service.asked[0]["input_ids"] == tokenizer.encode("the cat")
        with Connection(address) as connection:
            talking = partner(connection, is_chat=False)
            messages = [user("the cat")]
            messages += [{"role": "assistant", "content": "".join(talking.answer(messages))}, user("on the")]
            again = "".join(talking.answer(messages))
            last = service.asked[-1]
            prompt = tokenizer.encode("".join(message["content"] for message in messages))
            assert last["START"] == [0] and last["input_ids"] == prompt[last["step"][0] :]
            assert "".join(partner(connection, session=6, is_chat=False).answer(messages)) == again


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
