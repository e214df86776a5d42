"""Ranks that die: what is said, how soon, and what is left."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from random import Random

import psutil
import pytest

from engine.config import Sampling
from engine.runtime.engine import Engine
from engine.runtime.rank_processes import RankError
from engine.storage.workspace import WEIGHTS
from tests.engine.runtime.ranked import CONFIG, make_workspace, options, recipe_of

LONG = Sampling(temperature=0.0, max_new_tokens=50, ignore_eos=True)
SECONDS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("ranks") / "workspace", recipe_of("fp16", "kv16"))


def wait_until_gone(process_ids, seconds=SECONDS):
    before = time.monotonic()
    while any(psutil.pid_exists(number) for number in process_ids):
        assert time.monotonic() - before < seconds, "a rank is left"
        time.sleep(0.02)


def test_a_rank_that_is_killed_in_a_step_ends_the_engine_and_is_named(folder):
    with closing(Engine.from_workspace(folder, options(tp=2))) as engine:
        [victim] = engine._others.process_ids
        for number in range(4):
            engine.add([5 + number, 9], LONG)
        for _ in range(3):
            engine.step()
        threading.Timer(0.05, os.kill, (victim, signal.SIGKILL)).start()
        before = time.monotonic()
        with pytest.raises(
            RankError, match=rf"^Rank 1 of the 2 .* \(process {victim}\) was killed by SIGKILL\. The en"
        ):
            while True:
                engine.step()
        assert time.monotonic() - before < SECONDS
        with pytest.raises(RankError, match="was killed by SIGKILL"):
            engine.step()
        wait_until_gone([victim])


def test_among_four_ranks_the_one_that_was_killed_is_named_not_those_that_miss_it(tmp_path):
    four = make_workspace(tmp_path / "workspace", recipe_of("fp16", "kv16"), config=replace(CONFIG, num_kv_heads=4))
    expected = Engine.from_workspace(four, options()).generate([[3, 4]], LONG)
    with closing(Engine.from_workspace(four, options(tp=4))) as engine:
        assert engine.generate([[3, 4]], LONG) == expected
        victims = engine._others.process_ids
        os.kill(victims[1], signal.SIGKILL)
        with pytest.raises(RankError, match=rf"^Rank 2 of the 4 .* \(process {victims[1]}\) was killed by SIGKILL"):
            engine.generate([[3, 4]], LONG)
        wait_until_gone(victims)


def test_an_error_in_a_rank_is_told_and_so_is_one_in_rank_0(folder, monkeypatch, capfd):
    with closing(Engine.from_workspace(folder, options(tp=2))) as engine:
        step = {"integers": b"", "lengths": [0], "draws": 0, "width": 0, "decodes": 0, "bases": [], "graph": 0}
        engine._others.tell({"type": "step", **step})
        with pytest.raises(RankError, match=r"^Rank 1 .* failed: ValueError|^Rank 1 .* failed: not enough values"):
            engine.generate([[3, 4]], LONG)
        wait_until_gone(engine._others.process_ids)
    with closing(Engine.from_workspace(folder, options(tp=2))) as engine:
        monkeypatch.setattr("engine.kernels.ops.likeliest", None)
        with pytest.raises(RankError, match=r"^Rank 0 .* \(this process\) failed: TypeError"):
            engine.generate([[3, 4]], LONG)
        wait_until_gone(engine._others.process_ids)


def test_a_damaged_file_is_said_as_by_one_rank_and_leaves_none(tmp_path):
    damaged = make_workspace(tmp_path / "workspace", recipe_of("w8a8", "kv16"))
    scales = damaged / WEIGHTS / "layers.0.attention.wo.0.weight_scale"
    scales.write_bytes(b"\xff" * scales.stat().st_size)
    with pytest.raises((ValueError, RankError), match=r"layers\.0\.attention\.wo\.\*: .* these are no scales"):
        Engine.from_workspace(damaged, options(tp=2))
    assert not [one for one in psutil.Process().children() if "rank_process" in str(one.cmdline())]


def test_an_interrupt_in_a_step_ends_the_ranks(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with closing(Engine.from_workspace(folder, options(tp=2))) as engine:
        monkeypatch.setattr("engine.kernels.ops.likeliest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[3, 4]], LONG)
        wait_until_gone(engine._others.process_ids)
        with pytest.raises(RankError, match="KeyboardInterrupt"):
            engine.generate([[3, 4]], LONG)


PROGRAM = """
import sys, time
from pathlib import Path
from engine.config import Sampling
from engine.runtime.engine import Engine
from tests.engine.runtime.ranked import options

engine = Engine.from_workspace(Path(sys.argv[1]), options(tp=2))
engine.add([3, 4], Sampling(temperature=0.0, max_new_tokens=50, ignore_eos=True))
engine.step()
print(*engine._others.process_ids, flush=True)
if sys.argv[2] == "steps":
    while True:
        engine.add([3, 4], Sampling(temperature=0.0, max_new_tokens=50, ignore_eos=True))
        while engine.has_work():
            engine.step()
elif sys.argv[2] == "stuck":
    with engine._others.together():  # as in a collective of a device, which nothing breaks off
        time.sleep(60)
"""


@contextmanager
def program(folder, how):
    """The program as a process, which does not outlive the block."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ranks_of(process):
    """The process ids that it prints once it has computed."""
    return [int(number) for number in process.stdout.readline().split()]


def test_ranks_leave_when_rank_0_is_killed(folder):
    with program(folder, "steps") as process:
        others = ranks_of(process)
        process.kill()
        _, said = process.communicate()
    wait_until_gone(others)
    assert others and not said


def test_a_program_that_ends_ends_its_ranks(folder):
    with program(folder, "ends") as process:
        others = ranks_of(process)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0 and not said
        wait_until_gone(others, 0.5)


def test_a_process_that_is_stuck_in_its_device_ends_with_the_rank(folder):
    with program(folder, "stuck") as process:
        [other] = ranks_of(process)
        os.kill(other, signal.SIGKILL)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        assert said.startswith("ingot: Rank 1 of the 2 tensor-parallel ranks") and said.count("\n") == 1


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ranks_that_are_killed_at_any_moment_end_all_within_five_seconds(folder, soak_row):
    """While they start, read, meet, and compute."""
    random = Random(11)
    for _ in range(30):
        with program(folder, "steps") as process:
            others = []
            while not others:
                time.sleep(0.01)
                with suppress(psutil.Error):  # one that is just becoming a rank
                    children = psutil.Process(process.pid).children()
                    others = [one for one in children if "rank_process" in str(one.cmdline())]
            time.sleep(random.uniform(0, 6))
            others[0].kill()
            soak_row["count"] += 1
            soak_row["failures"] += 1  # until it is none
            _, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 1 and "Rank 1 of the 2 tensor-parallel ranks" in said and "SIGKILL" in said
            soak_row["failures"] -= 1
