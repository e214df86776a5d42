import torch

from engine.models import ranks
from engine.models.ranks import Ranks
from engine.runtime.rank_processes import RankProcesses
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
