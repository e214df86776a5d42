import io
import json
import threading
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cli import chat
from cli.main import main
from server.client import Message, Params
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path)
    return path


class Echo(chat.Partner):
    """Answers with how many messages it was sent, in two pieces; `stop` and `refuse` do what they say."""

    def __init__(self) -> None:
        self.sent: list[list[Message]] = []
        self.closed = 0

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        self.sent.append(list(messages))
        try:
            if messages[-1]["content"] == "refuse":
                raise ValueError("not this")
            yield f"{len(messages)} "
            if messages[-1]["content"] == "stop":
                raise KeyboardInterrupt
            yield "messages\x1b"
        finally:
            self.closed += 1


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "\nfirst\nof two lines\n\nrefuse\n\nstop\n\nagain\n\n/reset\nnew\n\n/exit\nnever\n\n")
    partner = Echo()
    chat.converse(partner)
    contents = [[message["content"] for message in messages] for messages in partner.sent]
    assert contents == [
        ["first\nof two lines"],
        ["first\nof two lines", "1 messages\x1b", "refuse"],
        ["first\nof two lines", "1 messages\x1b", "stop"],
        ["first\nof two lines", "1 messages\x1b", "stop", "3 ", "again"],
        ["new"],
    ]
    assert partner.closed == 5
    shown = capsys.readouterr().out
    assert "(not this)" in shown
    assert "(stopped)" in shown
    assert "\x1b" not in shown


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(
        monkeypatch,
        "/params top_k=3 seed=\n/params top_k=x\n/params size=3\n/system be brief\nhi\n\n"
        "/reset\n/etc/motd\n\n/wrong\n/exit\n",
    )
    partner = Echo()
    partner.params = Params(seed=7)
    chat.converse(partner)
    ruled = {"role": "system", "content": "be brief"}
    assert partner.sent == [[ruled, {"role": "user", "content": text}] for text in ("hi", "/etc/motd")]
    assert partner.params == Params(top_k=3)
    shown = capsys.readouterr().out
    for words in ("top_k is a whole number", "size is no parameter", "/wrong is no command", "top_k=3 max_tokens=512"):
        assert words in shown


def test_ctrl_c_at_the_prompt_drops_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Iterator[str | BaseException] = iter(
        ["half a", KeyboardInterrupt(), KeyboardInterrupt(), "whole", "", EOFError()]
    )

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    partner = Echo()
    chat.converse(partner)
    assert partner.sent == [[{"role": "user", "content": "whole"}]]


def test_the_end_of_the_input_sends_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "no empty line")
    partner = Echo()
    chat.converse(partner)
    assert partner.sent == [[{"role": "user", "content": "no empty line"}]]


def test_with_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed(monkeypatch, "the cat\n\nthe dog\n\n/exit\n")
    assert main(["chat", f"folder={folder}", "--max-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.count(">>> ") == 3


def test_generate_prints_one_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--chat"]):
        assert main(["generate", f"folder={folder}", "the cat", "--max-new-tokens", "6", *options]) == 0
        assert capsys.readouterr().out.strip()
    assert main(["generate", "nothing", "the cat"]) == 1
    assert "artifact=ID or folder=" in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    """A server that speaks the two routes that the client needs, and asks for the key `k`."""

    def do_GET(self) -> None:
        self.reply(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.dumps({"choices": [{"delta": {"content": text}}]}) for text in ("Hel", "lo é")]
        lines.append(json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
        self.reply("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode())

    def reply(self, content: bytes) -> None:
        allowed = self.headers.get("Authorization") == "Bearer k"
        body = content if allowed else b'{"error": {"message": "a key, please"}}'
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Generator[str, None, None]:
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_with_a_server(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("k\n")
    typed(monkeypatch, "hi\n\n")
    assert main(["chat", url, "--api-key-file", str(tmp_path / "key")]) == 0
    assert "Hello é" in capsys.readouterr().out
    monkeypatch.setenv("INGOT_API_KEY", "wrong")
    assert main(["chat", url]) == 1
    assert f"{url} does not know this key: give --api-key-file=FILE" in capsys.readouterr().err
    monkeypatch.delenv("INGOT_API_KEY")
    (tmp_path / "keys").write_text("alice: k\nbob: k2\n")
    typed(monkeypatch, "hi\n\n")
    assert main(["chat", url, "--api-key-file", str(tmp_path / "keys")]) == 0
    assert main(["chat", url, "--api-key-file", str(tmp_path / "none")]) == 1
    assert "none cannot be read: No such file or directory. Name a file" in capsys.readouterr().err


def test_with_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    for partner, message in (
        ("http://127.0.0.1:1", "no server answers at http://127.0.0.1:1: Connection refused. Start one"),
        ("demo", "nobody to chat with"),
    ):
        assert main(["chat", partner]) == 1
        assert message in capsys.readouterr().err
