"""Adapters of other libraries, as the registry has them today, in an environment that only this test uses."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.server.running import KEY, Served

SCRIPT = Path(__file__).with_name("adapters_client.py")
PACKAGES = ["langchain-openai", "litellm"]
DONE = 12


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_langchain_and_litellm_chat_and_call_a_tool_soak(
    roomy: Served, tmp_path: Path, soak_row: dict[str, int]
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    subprocess.run(install, check=True, timeout=1200)
    asked = [python, "-P", SCRIPT, f"{roomy.url}/v1", KEY]
    done = subprocess.run(
        asked, capture_output=True, text=True, timeout=600, env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    )
    print(done.stdout, file=sys.stderr)
    soak_row["count"] = len(done.stdout.splitlines())
    soak_row["failures"] = DONE - soak_row["count"]
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert soak_row["count"] == DONE
