import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from cli.main import main
from cli.serve import read_keys, warn_unmeasured
from cli.target import Target
from server.config import ServeConfig, ServedModel, check_exposure
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path)
    return path


@contextlib.contextmanager
def server(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ingot serve` as a process, and its URL once it is ready."""
    command = [sys.executable, "-m", "cli.main", "serve", "serve.port=0", "serve.cache_max_entry_count=100", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next((line.split()[1] for line in lines if line.startswith("URL")), "")
        assert url, process.communicate()[1]
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_it_serves_until_a_signal_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key.txt"
    key_file.write_text("secret-key\n")
    with server(f"folder={folder}", f"serve.api_key_file={key_file}", "serve.session_len=64") as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret-key", max_retries=0) as api:
            [model] = api.models.list()
            assert (model.id, model.artifact_id, model.session_len) == ("tiny", None, 64)
            messages = [{"role": "user", "content": "the cat"}]
            stream = api.chat.completions.create(model="tiny", messages=messages, max_tokens=5, stream=True)
            assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "UNVERIFIED FOLDER" in said
        assert "secret-key" not in said
        assert "Traceback" not in said
        assert not any(child.is_running() for child in children)


def test_after_a_signal_running_requests_end_and_none_is_let_in(folder: Path) -> None:
    with server(f"folder={folder}", "serve.drain_timeout=50") as (process, url), httpx.Client(base_url=url) as http:
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json={**body, "n": 16}) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health/ready").status_code == 200:
                assert process.poll() is None
            assert httpx.get(f"{url}/health/live").status_code == 200
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_ending")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in line for line in rest) == 16
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "ending: 16 running requests have 50 s" in said


def test_a_second_signal_ends_running_requests(folder: Path) -> None:
    with server(f"folder={folder}", "serve.max_batch_size=1") as (process, url), httpx.Client(base_url=url) as http:
        body = {"model": "tiny", "prompt": ["the cat"] * 8, "ignore_eos": True, "stream": True, "n": 128}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health/ready").status_code == 200:
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "engine_stopped" in rest[-1]
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "Traceback" not in said


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_it_speaks_https_with_a_certificate(folder: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(make, check=True, capture_output=True)
    with server(f"folder={folder}", f"serve.tls_cert_file={cert}", f"serve.tls_key_file={key}") as (_, url):
        assert url.startswith("https://")
        assert httpx.get(f"{url}/health/live", verify=ssl.create_default_context(cafile=cert)).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/health/live")


def test_the_end_of_the_engine_ends_the_server(folder: Path) -> None:
    with server(f"folder={folder}", INGOT_API_KEY="k") as (process, _):
        [engine] = psutil.Process(process.pid).children()
        engine.kill()
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "ingot: the engine process was killed by signal 9" in said
        assert "Traceback" not in said


def test_a_signal_while_loading_ends_it_too(folder: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "serve", "serve.port=0", f"folder={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("loading") for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "URL" not in out
    assert "Traceback" not in said


def test_a_busy_port_is_one_paragraph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", f"folder={folder}", f"serve.port={port}"]) == 1
    said = capsys.readouterr().err
    assert f"ingot: cannot listen on 127.0.0.1:{port}: Address already in use." in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to run"),
        (["artifact=abcd", "folder=/tmp"], "one of them"),
        (["folder=/nowhere/at/all"], "is not a folder"),
        (["folder=conf"], "folder=conf is no TurboMind workspace: it has no triton_models/weights/config.ini."),
        (["folder=demo/model"], "It is a checkpoint: `ingot convert NAME demo/model`"),
        (["artifact=abcd", "store=/nowhere/at/all"], "no artifact 'abcd'"),
        (["folder=/tmp", "serve.host=0.0.0.0"], "no key is set"),
        (["folder={folder}", "serve.host=no.such.host.invalid", "serve.api_key=k"], "not an address of this machine"),
        (["folder=/tmp", "--cfg", "hydra"], "--cfg job"),
        (["folder=/tmp", "serve.api_key_file=/nowhere/key"], "/nowhere/key"),
        (["folder=/tmp", "serve.tls_cert_file=/nowhere/cert.pem"], "give both, or neither"),
        (["folder=/tmp", "serve.tls_cert_file=README.md", "serve.tls_key_file=README.md"], "Both must be PEM files"),
        (["folder=/tmp", "serve.tls_cert_file=/nowhere/a", "serve.tls_key_file=/nowhere/a"], "No such file"),
        (["folder=/tmp", "serve.cors_origins=[example.org]"], "a list of origins such as [https://example.org]"),
        (["folder=/tmp", "serve.max_body_bytes=12"], "serve.max_body_bytes is 12, but must be from 1024"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    assert main(["serve", *(text.format(folder=folder) for text in arguments)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_options_that_nobody_measured_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    artifact = Target(folder=Path("x"), model=ServedModel(name="x", artifact_id="a" * 64))
    plain = Target(folder=Path("x"), model=ServedModel(name="x"))
    changed = ServeConfig(quant_policy=0, rope_scaling_factor=2.0)
    warn_unmeasured(plain, changed)
    warn_unmeasured(artifact, ServeConfig(max_batch_size=3, cache_max_entry_count="1GB"))
    assert not capsys.readouterr().err
    warn_unmeasured(artifact, changed)
    said = capsys.readouterr().err
    assert said == "UNMEASURED serve.quant_policy, serve.rope_scaling_factor: the artifact was evaluated without\n"


def test_help_lists_every_option_with_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ServeConfig.__dataclass_fields__.keys() - {"api_key"}:
        assert f"\nserve.{name}: " in shown
    assert "of the memory that is FREE once the weights are loaded (LMDeploy v0.1.0: of\n" in shown


def test_cfg_job_hides_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "artifact=3e911223", "serve.api_key=hunter2", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "artifact: 3e911223" in shown
    assert "hunter2" not in shown


def test_where_the_key_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    assert read_keys(ServeConfig()) == {}
    monkeypatch.setenv("INGOT_API_KEY", "from-environment")
    assert read_keys(ServeConfig()) == {"default": "from-environment"}
    file = tmp_path / "key"
    file.write_text(" from-file \n")
    assert read_keys(ServeConfig(api_key_file=str(file))) == {"default": "from-file"}
    assert not capsys.readouterr().err
    assert read_keys(ServeConfig(api_key="on-the-line")) == {"default": "on-the-line"}
    said = capsys.readouterr().err
    assert "serve.api_key_file" in said
    assert "on-the-line" not in said
    for content in ("", "two words", "ключ"):
        file.write_text(content)
        with pytest.raises(ValueError, match="does not hold a key"):
            read_keys(ServeConfig(api_key_file=str(file)))
    with pytest.raises(ValueError, match="both given"):
        ServeConfig(api_key="a", api_key_file="b")


def test_only_loopback_goes_without_a_key() -> None:
    for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"):
        check_exposure(host, {})
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ValueError, match="no key is set"):
            check_exposure(host, {})
        check_exposure(host, {"default": "key"})


@pytest.mark.parametrize("kind", ["text", "json", "none"])
def test_one_access_log_at_a_time(folder: Path, kind: str) -> None:
    with server(f"folder={folder}", f"serve.access_log={kind}") as (process, url):
        assert httpx.get(f"{url}/health/live").status_code == 200
        process.terminate()
        said = process.communicate(timeout=30)[1]
    told = [line for line in said.splitlines() if "/health/live" in line]
    assert len(told) == (kind != "none")
    assert [line.startswith('{"time": ') for line in told] == [kind == "json"] * len(told)
