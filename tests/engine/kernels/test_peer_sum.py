"""Exchanges of ranks through each other's memory. Here all ranks are in one process, one after the other: what a rank
waits for must be there before it is run, so it is written as the format says, and then compared with what comes."""

import pytest
import torch

from tests.engine.kernels.paged import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels import peer_sum
from engine.kernels.peer_sum import MOST_WORDS, Peers

PLACES = [(size, shape) for size in (2, 3) for shape in ((1, 64), (3, 1002), (64, 48))]


class Group:
    """All ranks of a group in one process."""

    def __init__(self, size):
        self.inboxes = [torch.zeros(2, size, MOST_WORDS, dtype=torch.int64, device=DEVICE) for _ in range(size)]
        assert self.inboxes[0].numel() == peer_sum.inbox_words(size)
        addresses = torch.tensor([inbox.data_ptr() for inbox in self.inboxes], device=DEVICE)
        zeros = lambda count: torch.zeros(count, dtype=torch.int32, device=DEVICE)  # noqa: E731
        self.peers = [
            Peers(rank, size, addresses, zeros(MOST_WORDS // peer_sum.BLOCK.value), zeros(1)) for rank in range(size)
        ]

    def run(self, call, given):
        """What every rank makes of what each is given."""
        number = torch.repeat_interleave(self.peers[0].counts.cpu().long() + 1, peer_sum.BLOCK.value)
        words = [x.flatten().view(torch.int32).long() & 0xFFFFFFFF for x in given]
        words = [word | number[: len(word)] << 32 for word in words]
        place = torch.arange(len(words[0]), device=DEVICE)
        half = (number[: len(place)] % 2).to(DEVICE)
        results = []
        for rank, peers in enumerate(self.peers):
            others = [other for other in range(len(self.peers)) if other != rank]
            for writer in others:
                if writer > rank:
                    self.inboxes[rank][half, writer, place] = words[writer].to(DEVICE)
            for other in others:
                self.inboxes[other][half, rank, place] = 0
            results.append(call(peers, given[rank].to(DEVICE, copy=True)).cpu())
            for other in others:
                assert torch.equal(self.inboxes[other][half, rank, place].cpu(), words[rank]), "what others wait for"
        return results


@pytest.mark.parametrize(("size", "shape"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_have_the_same_bits_on_all_ranks(size, shape, dtype):
    group, random = Group(size), torch.Generator().manual_seed(size)
    for rows in (shape[0], shape[0], 1, shape[0], shape[0]):
        given = [torch.randn(rows, shape[1], generator=random).to(dtype) for _ in range(size)]
        assert all(peers.carry(x) for peers, x in zip(group.peers, given, strict=True))
        expected = given[0].float()
        for x in given[1:]:
            expected = expected + x.float()
        first, *others = group.run(Peers.sum, given)
        assert all(torch.equal(first, other) for other in others)
        if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off
            torch.testing.assert_close(first.float(), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(first, expected.to(dtype))


@pytest.mark.parametrize("size", [2, 3])
def test_maxima(size):
    group, random = Group(size), torch.Generator().manual_seed(0)
    for rows in (1, 700):
        given = [torch.randn(rows, generator=random) for _ in range(size)]
        given[0][0] = given[-1][-1] = float("-inf")
        expected = torch.stack(given).amax(0)
        for result in group.run(Peers.max, given):
            assert torch.equal(result, expected)
    given = [torch.zeros(3), *(torch.tensor([1.0, float("nan"), -1.0]) for _ in range(size - 1))]
    for result in group.run(Peers.max, given):
        assert result[0] == 1 and result[1].isnan() and result[2] == 0


def test_what_is_not_carried():
    [peers, _] = Group(2).peers
    half = torch.zeros(2 * MOST_WORDS, dtype=torch.float16)
    assert peers.carry(half) and peers.carry(torch.zeros(MOST_WORDS))
    assert not peers.carry(torch.zeros(2 * MOST_WORDS + 2, dtype=torch.float16))
    assert not peers.carry(half[:3]) and not peers.carry(half[:0])
    assert not peers.carry(half[:8].view(4, 2).t()) and not peers.carry(torch.zeros(4, dtype=torch.int32))
    assert not Group(3).peers[0].carry(half)


def test_a_stopped_exchange_ends():
    [peers, _] = Group(2).peers
    peers.stop.fill_(1)
    peers.sum(torch.ones(2, 64, dtype=torch.float16, device=DEVICE))  # nobody answers
    assert peers.counts[0] == 1
