"""LMDeploy's `serve api_server`, `api_client`, `gradio`, `chat turbomind` and `chat torch`."""

import io
import re
import shlex
from pathlib import Path

import httpx
import psutil
import pytest

from cli.main import main
from server.client import Client
from tests.cli.test_seed import document_lines
from tests.cli.test_web import process
from tests.pipelines.tiny_checkpoint import write_tiny_checkpoint
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path, session_len=1024)
    return path


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_server_and_its_client(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with process(
        "serve", "api_server", str(folder), "--server_name", "127.0.0.1", "--server_port", "0", "--instance_num", "4",
        "--tp", "1", "--cache-max-entry-count", "80", until="URL",
    ) as (_, url):  # fmt: skip
        typed(monkeypatch, "/params max_tokens=5\nthe cat\n\nthe dog\n\nexit\n")
        assert main(["serve", "api_client", url, "3"]) == 0
        assert capsys.readouterr().out.count(">>> ") == 4
        with Client(url) as client:
            taken = client.interactive(3, "the rain", request_output_len=1)
            assert "".join(taken) is not None
            assert taken.usage is not None
            kept = taken.usage.prompt_tokens
            typed(monkeypatch, "end\nexit\n")
            assert main(["serve", "api_client", url, "3"]) == 0
            again = client.interactive(3, "the rain", request_output_len=1)
            list(again)
            assert again.usage is not None
            assert again.usage.prompt_tokens < kept


def test_a_page_of_a_folder(folder: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install gradio")
    with process("serve", "gradio", str(folder), "--server-port", "0", "--restful_api", "True", until="page") as (
        page,
        url,
    ):
        reply = httpx.get(url, trust_env=False)
        assert reply.status_code == 200
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        started = psutil.Process(page.pid).children(recursive=True)
        assert any("serve" in child.cmdline() for child in started)
        page.terminate()
        assert page.wait(30) == 0
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_a_folder_in_the_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "the cat\n\nend\nexit\n")
    assert main(["chat", "turbomind", str(folder), "--request_output_len", "4"]) == 0
    assert "forgotten" in capsys.readouterr().out
    write_tiny_checkpoint(tmp_path / "checkpoint")
    typed(monkeypatch, "the cat\n\nexit\n")
    assert main(["chat", "torch", str(tmp_path / "checkpoint"), "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert "converting" in shown.err
    assert shown.out.count(">>> ") == 2


def test_what_the_document_asks_for_needs_a_key_where_others_can_reach_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    lines = document_lines("serve api_server")
    assert lines
    for line in lines:
        assert main(shlex.split(line.replace("./workspace", str(folder)))) == 1
        assert "no key is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "api_server", "nowhere"], "neither a workspace"),
        (["serve", "api_server", "nowhere", "--instance-nun", "3"], "Did you mean --instance-num"),
        (["serve", "api_client", "http://127.0.0.1:1"], "no server answers"),
        (["serve", "gradio", "localhost:6006"], "neither a workspace"),
        (["chat", "turbomind", "nowhere", "--cap", "infilling"], "only chat is a dialogue"),
        (["chat", "torch", "nowhere"], "nor a checkpoint"),
    ],
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert re.search(words, capsys.readouterr().err)
