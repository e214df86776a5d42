import subprocess
import sys

import pytest

from benchmarks.bench import BENCHMARKS
from cli.main import main


def test_the_overview_and_every_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    overview = capsys.readouterr().out
    for name in BENCHMARKS:
        assert name in overview
        with pytest.raises(SystemExit):
            main(["bench", name, "--help"])
        assert f"usage: ingot bench {name}" in capsys.readouterr().out


def test_a_benchmark_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generaton"]) == 1
    assert "Did you mean `ingot bench generation`?" in capsys.readouterr().err


def test_offline_benchmarks_need_no_server_and_no_build_system() -> None:
    """A GPU machine may have torch and the tokenizers' libraries alone."""
    code = """
import sys
from cli.main import main
main(["bench", "generation", "shape=tiny", "device=cpu", "batch=1", "output=4", "out=none"])
main(["bench", "throughput", "shape=tiny", "device=cpu", "requests=2", "out=none"])
heavy = ("hydra", "omegaconf", "dvc", "fastapi", "uvicorn", "pydantic", "datasets", "transformers")
print([module for module in heavy if module in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"
