import subprocess
import sys
from types import SimpleNamespace

import pytest

from cli import main as command


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from cli.main import main; main(['--help']); print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in command.VERBS)
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert "importlib" in imported
    heavy = {"torch", "transformers", "hydra", "omegaconf", "dvc", "fastapi", "pydantic", "uvicorn", "httpx", "yaml"}
    assert not imported & (heavy | {"argparse", "asyncio", "engine", "server", "pipelines"})


@pytest.mark.parametrize("verb", command.VERBS)
def test_every_verb_answers_help(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", verb, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["sevre"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ingot: there is no verb 'sevre'. Did you mean `ingot serve`?")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("one\n  paragraph"), 1, "ingot: one paragraph\n"),
        (FileNotFoundError("nothing there"), 1, "ingot: nothing there\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fails(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(main=fails))
    assert command.main(["serve", "x"]) == code
    assert capsys.readouterr().err == said
    with pytest.raises(type(error)) if isinstance(error, Exception) else pytest.raises(BaseException):
        if isinstance(error, KeyboardInterrupt):
            raise error
        command.main(["--debug", "serve", "x"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argv: list[str]) -> int:
        raise AssertionError

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(main=fails))
    with pytest.raises(AssertionError):
        command.main(["serve"])


def test_a_closed_pipe_is_no_error() -> None:
    shell = f"set -o pipefail; {sys.executable} -m cli.main serve --help | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
