import os
import signal
import time

import pytest
import torch

from engine.models import ranks
from engine.models.ranks import Ranks
from engine.runtime.rank_processes import RankError, RankProcesses
from tests.engine.models import summing_rank
from tests.engine.models.talking_rank import CPU, talk


def test_ranks_hear_what_the_others_say():
    size, threads = 2, torch.get_num_threads()
    others = RankProcesses(size, {}, module="tests.engine.models.talking_rank")
    try:
        others.wait_for("loaded")
        with others.together():
            ranks.join(others.store, 0, size, CPU)
            talk(Ranks(0, size))
        others.wait_for("heard")
    finally:
        others.close()
    assert not ranks.joined() and torch.get_num_threads() == threads


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_add_up_and_a_wait_for_one_that_died_ends():
    size, device = 2, torch.device("cuda:0")
    torch.cuda.set_device(device)
    others = RankProcesses(size, {}, module="tests.engine.models.summing_rank")
    try:
        others.wait_for("loaded")
        with others.together():
            ranks.join(others.store, 0, size, device)
            summing_rank.add_up(Ranks(0, size), device)
        others.wait_for("heard")
        os.kill(others.process_ids[0], signal.SIGKILL)
        killed = time.monotonic()
        x = torch.ones(4, 64, dtype=torch.float16, device=device)
        Ranks(0, size).sum(x)
        torch.cuda.synchronize(device)
        assert time.monotonic() - killed < 5
        with pytest.raises(RankError, match=r"Rank 1 of the 2 .* was killed by SIGKILL"), others.together():
            pass
    finally:
        others.close()
