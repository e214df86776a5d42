import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cli.main import main
from tests.cli.test_serve import folder, server  # noqa: F401  a fixture


def test_it_says_as_an_exit_code_whether_a_server_is_ready(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    keys, wrong = tmp_path / "keys", tmp_path / "wrong"
    keys.write_text("# callers\none: first-key\ntwo: second-key\n")
    wrong.write_text("another-key\n")
    with server(f"folder={folder}", f"serve.api_key_file={keys}", "serve.drain_timeout=50") as (process, url):
        assert main(["health", url, "--api-key-file", str(keys)]) == 0
        assert main(["health", f"{url}/", "--live", "--api-key-file", str(keys)]) == 0
        assert capsys.readouterr().out == "ready\nlive\n"
        monkeypatch.setenv("INGOT_API_KEY", "second-key")
        assert main(["health", url]) == 0
        monkeypatch.delenv("INGOT_API_KEY")
        for options in ([], ["--api-key-file", str(wrong)]):
            assert main(["health", url, *options]) == 1
            assert "does not know this key" in capsys.readouterr().err
        process.terminate()
        process.communicate(timeout=30)
    assert main(["health", url, "--api-key-file", str(keys)]) == 1
    assert f"ingot: {url} does not answer: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (503, b'{"status": "the server is ending"}', "is not ready: the server is ending."),
        (404, b"<html>", "is not ready: it answers with status 404, not as Ingot does."),
        (302, b"[]", "is not ready: it answers with status 302"),
    ],
)
def test_anything_but_a_ready_server_is_one_that_is_not(
    status: int, body: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as other:
        threading.Thread(target=other.handle_request).start()
        assert main(["health", f"http://127.0.0.1:{other.server_port}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: URL"),
        (["nowhere"], "'nowhere' is not the URL of a server"),
        (["http://127.0.0.1:1", "--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    assert main(["health", *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
