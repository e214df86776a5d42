"""LMDeploy's `serve api_server`, `api_client`, `gradio`, `chat turbomind` and `chat torch`."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
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
        (["chat", "torch", "nowhere", "--accel", "deepspeed"], "--accel deepspeed cannot be honoured: this engine has"),
        (["chat", "torch", "nowhere", "--log_file", "chat.log"], "no prompt and no answer is written to a file"),
        (["chat", "torch", "nowhere", "--adapter=InternLM"], "is the checkpoint's chat template"),
        (["chat", "torch", "nowhere", "--max_alloc", "2048"], "the memory of the KV cache is"),
        (["chat", "torch", "nowhere", "--accel", "None", "--debug", "False"], "nor a checkpoint"),
        (["serve", "api_server", "nowhere", "--allow_credentials", "True"], "cookies mean nothing to this server"),
        (["serve", "api_server", "nowhere", "--allow-methods", "['GET']"], "may use any method"),
        (["serve", "api_server", "nowhere", "--allow-methods", "['*']"], "neither a workspace"),
        (["serve", "api_server", "nowhere", "--allow_origins", "[1]"], "is no list of origins"),
        (["serve", "api_server", "{folder}", "--allow_origins", "example.org"], "serve.cors_origins is"),
        (["serve", "api_server", "nowhere", "--log-level", "LOUD"], "'LOUD' is none of CRITICAL, ERROR"),
        (["serve", "gradio", "http://127.0.0.1:1", "name"], "NAME goes with a FOLDER"),
    ],
)
def test_mistakes(arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([each.format(folder=folder) for each in arguments]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_lmdeploys_flags_mean_what_they_say(folder: Path) -> None:
    page = "https://example.org"
    with process(
        "serve", "api_server", str(folder), "given", "--server_port", "0", "--cache-max-entry-count", "80",
        "--allow_origins", f"['{page}']", "--allow_credentials", "False", "--log_level", "ERROR",
        "--session_len", "96", until="URL",
    ) as (running, url):  # fmt: skip
        answer = httpx.get(f"{url}/v1/models", headers={"Origin": page})
        assert answer.headers["access-control-allow-origin"] == page
        assert "access-control-allow-credentials" not in answer.headers
        [model] = answer.json()["data"]
        assert (model["id"], model["session_len"]) == ("given", 96)
        assert (
            "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers={"Origin": "https://a"}).headers
        )
        running.terminate()
        running.wait(30)


def test_an_answer_at_once_and_a_system_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for stream in ("True", "False"):
        typed(monkeypatch, "/system\n/params\nthe cat\n\nexit\n")
        flags = ["--request_output_len", "6", "--stream_output", stream, "--meta_instruction", "be kind"]
        assert main(["chat", "turbomind", str(folder), *flags, "--top_k", "1", "--session-len", "64"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "(system prompt: be kind)" in shown[0]
    assert "top_k=1" in shown[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["converting", ">>> "])
def test_a_checkpoint_that_is_chatted_with_leaves_no_folder(tmp_path: Path, number: signal.Signals, when: str) -> None:
    write_tiny_checkpoint(tmp_path / "checkpoint")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "cli.main", "chat", "torch", str(tmp_path / "checkpoint")]
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, **both) as chat:
        assert chat.stdout is not None
        said = b""
        while when.encode() not in said:
            said += (piece := chat.stdout.read(1))
            assert piece, said
        assert any(scratch.iterdir())
        time.sleep(0.5)  # it reads now: Python sees no signal between its prompt and the read
        chat.send_signal(number)
        said += chat.stdout.read()
        assert chat.wait(30) == 0
    assert b"Traceback" not in said
    assert not any(scratch.iterdir())
