import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.others import Others


@pytest.fixture
def idle() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield psutil.Process(process.pid)
        process.communicate(b"\n")


def test_what_others_compute_is_counted_and_ones_own_is_not(idle: psutil.Process) -> None:
    as_other, as_own, begun = Others(idle), Others(), time.perf_counter()
    burnt = -time.process_time()
    while burnt + time.process_time() < 0.5:
        pass
    burnt += time.process_time()
    other, own = as_other.share(), as_own.share()
    whole = (time.perf_counter() - begun) * (psutil.cpu_count() or 1)
    assert 0 <= own < other <= 1
    assert (other - own) * whole == pytest.approx(burnt, abs=0.2)
