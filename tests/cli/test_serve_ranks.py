"""`ingot serve` with two tensor-parallel ranks on this CPU, and what is left when one of them dies."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from engine.config import EngineConfig, Sampling
from engine.runtime.engine import Engine
from engine.runtime.tokenizer import Tokenizer
from engine.storage.workspace import TOKENIZER
from tests.cli.test_serve import server
from tests.tiny_artifact import write_tiny_artifact

SECONDS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path)
    return path


def family(process_id: int) -> tuple[psutil.Process, psutil.Process]:
    """The engine's process and that of its other rank."""
    [engine] = psutil.Process(process_id).children()
    [rank] = engine.children()
    return engine, rank


def test_it_answers_as_one_rank_does_and_ends_with_a_rank_that_is_killed_in_a_request(folder: Path) -> None:
    engine = Engine.from_workspace(folder, EngineConfig(cache_max_entry_count=100))
    prompt_ids = Tokenizer(folder / TOKENIZER).encode("the cat")
    [expected] = engine.generate([prompt_ids], Sampling(temperature=0.0, max_new_tokens=30, ignore_eos=True))
    with server(f"folder={folder}", "serve.tp=2") as (process, url), httpx.Client(base_url=url, timeout=30) as http:
        alive = family(process.pid)
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected.text
        assert "ingot:num_requests_running" in http.get("/metrics").text
        with http.stream("POST", "/v1/completions", json={**body, "max_tokens": 100, "n": 8, "stream": True}) as stream:
            lines = stream.iter_lines()
            assert "error" not in json.loads(next(lines).removeprefix("data: "))
            before = time.monotonic()
            alive[1].kill()
            last = [line for line in lines if line][-1]
        assert "The engine has stopped" in json.loads(last.removeprefix("data: "))["error"]["message"]
        killed = f"Rank 1 of the 2 tensor-parallel ranks (process {alive[1].pid}) was killed by SIGKILL."
        _, said = process.communicate(timeout=SECONDS)
        assert time.monotonic() - before < SECONDS
        assert process.returncode == 1 and said.count(killed) == 1 and "Traceback" not in said
        assert not any(one.is_running() for one in alive)


@pytest.mark.parametrize("victim", ["rank", "server"])
def test_the_death_of_one_process_is_that_of_all(folder: Path, victim: str) -> None:
    with server(f"folder={folder}", "serve.tp=2") as (process, _):
        alive = family(process.pid)
        before = time.monotonic()
        os.kill(process.pid if victim == "server" else alive[1].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=SECONDS)
        gone, left = psutil.wait_procs(alive, timeout=max(before + SECONDS - time.monotonic(), 0))
        assert not left and len(gone) == 2
        assert process.returncode == (-signal.SIGKILL if victim == "server" else 1)
        assert said.count("was killed by") == (victim == "rank") and "Traceback" not in said


def test_two_signals_do_not_leave_a_rank(folder: Path) -> None:
    """Ctrl-C in a terminal reaches every process: only the server decides what it means."""
    with server(f"folder={folder}", "serve.tp=2") as (process, _):
        alive = family(process.pid)
        for one in (*alive, psutil.Process(process.pid)):
            one.send_signal(signal.SIGINT)
        threading.Timer(0.2, process.send_signal, (signal.SIGINT,)).start()
        _, said = process.communicate(timeout=15)
        assert process.returncode == 0 and "Traceback" not in said and "killed" not in said
        assert not any(one.is_running() for one in alive)
