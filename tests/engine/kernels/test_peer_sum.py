"""Exchanges of ranks through each other's memory. Here all ranks are in one process, one after the other: what a rank
waits for must be there before it is run, so it is written as the format says, and then compared with what comes."""

import pytest
import torch

from tests.engine.kernels.paged import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
from engine.kernels import norm, peer_sum
from engine.kernels.peer_sum import MOST_ROWS, MOST_WORDS, ROW_WORDS, Peers

BLOCKS, EPS = MOST_WORDS // peer_sum.BLOCK.value, 1e-5
PLACES = [(size, shape) for size in (2, 3) for shape in ((1, 64), (3, 1002), (64, 48))]


class Group:
    """All ranks of a group in one process."""

    def __init__(self, size):
        words = peer_sum.inbox_words(size)
        self.inboxes = [torch.zeros(words, dtype=torch.int64, device=DEVICE) for _ in range(size)]
        addresses = torch.tensor([inbox.data_ptr() for inbox in self.inboxes], device=DEVICE)
        zeros = lambda count: torch.zeros(count, dtype=torch.int32, device=DEVICE)  # noqa: E731
        holds = tuple(self.inboxes)
        self.peers = [Peers(rank, size, addresses, zeros(peer_sum.COUNTS), zeros(1), holds) for rank in range(size)]

    def run(self, call, given):
        """What every rank makes of what each is given."""
        number = torch.repeat_interleave(self.peers[0].counts[:BLOCKS].cpu().long() + 1, peer_sum.BLOCK.value)
        number = number[: given[0].numel() * given[0].element_size() // 4]
        begin = len(self.peers) * MOST_WORDS * (number % 2)
        return self._run(call, given, number, begin + torch.arange(len(number)), MOST_WORDS)

    def norm(self, given, residual, weight):
        """The same of `add_rms_norm`: the norm and the stream of every rank."""
        size, (rows, width) = len(self.peers), given[0].shape
        number = self.peers[0].counts[BLOCKS : BLOCKS + rows, None].cpu().long() + 1
        begin = 2 * size * MOST_WORDS + size * MOST_ROWS * ROW_WORDS * (number % 2)
        place = begin + ROW_WORDS * torch.arange(rows)[:, None] + torch.arange(width // 2)
        number = number.expand_as(place).flatten()
        call = lambda peers, x: torch.stack(peers.add_rms_norm(x, residual, weight, EPS))  # noqa: E731
        return self._run(call, given, number, place.flatten(), MOST_ROWS * ROW_WORDS)

    def _run(self, call, given, number, place, most):
        """Word i with its number is at place[i] of rank 0's part of an inbox, and of the others `most` further."""
        words = [x.flatten().view(torch.int32).long() & 0xFFFFFFFF | number << 32 for x in given]
        places = [(place + rank * most).to(DEVICE) for rank in range(len(given))]
        results = []
        for rank, peers in enumerate(self.peers):
            others = [other for other in range(len(self.peers)) if other != rank]
            for writer in others:
                if writer > rank:
                    self.inboxes[rank][places[writer]] = words[writer].to(DEVICE)
            for other in others:
                self.inboxes[other][places[rank]] = 0
            results.append(call(peers, given[rank].to(DEVICE, copy=True)).cpu())
            for other in others:
                assert torch.equal(self.inboxes[other][places[rank]].cpu(), words[rank]), "what others wait for"
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


@pytest.mark.parametrize(("size", "width"), [(2, 64), (2, 1002), (3, 1026), (2, 4096)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_with_a_norm_have_the_bits_of_two_kernels(size, width, dtype):
    """Rows of several numbers and lengths by turns, and sums without a norm between them."""
    fused, apart, random = Group(size), Group(size), torch.Generator().manual_seed(width)
    draw = lambda *shape: torch.randn(*shape, generator=random).to(dtype)  # noqa: E731
    for turn, rows in enumerate((3, 3, 1, 5, 2, 5, 5)):
        length = width if turn % 3 else width // 2 + width // 2 % 2
        given, residual, weight = [draw(rows, length) for _ in range(size)], draw(rows, length), draw(length)
        assert all(peers.carry_rows(x) for peers, x in zip(fused.peers, given, strict=True))
        residual, weight = residual.to(DEVICE), weight.to(DEVICE)
        found = fused.norm(given, residual, weight)
        assert all(torch.equal(found[0], other) for other in found[1:])
        whole = apart.run(Peers.sum, given)[0]
        normed, total = norm.add_rms_norm(whole.to(DEVICE), residual, weight, EPS)
        assert torch.equal(found[0][1], total.cpu()) and torch.equal(found[0][0], normed.cpu())
        if turn % 2:
            between = [draw(2, 700) for _ in range(size)]
            assert torch.equal(fused.run(Peers.sum, between)[0], apart.run(Peers.sum, between)[0])
    assert fused.peers[0].counts[BLOCKS : BLOCKS + 6].tolist() == [7, 6, 5, 3, 3, 0]


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
    assert peers.carry_rows(half.view(MOST_ROWS, -1)) and peers.carry_rows(half.view(-1, 2 * ROW_WORDS))
    assert not peers.carry_rows(half.view(2 * MOST_ROWS, -1)) and not peers.carry_rows(half.view(-1, 4 * ROW_WORDS))
    assert not peers.carry_rows(half[:6].view(2, 3)) and not peers.carry_rows(torch.zeros(2, 4))


def test_a_stopped_exchange_ends():
    [peers, _] = Group(2).peers
    peers.stop.fill_(1)
    peers.sum(torch.ones(2, 64, dtype=torch.float16, device=DEVICE))  # nobody answers
    assert peers.counts[0] == 1
    x = torch.ones(2, 64, dtype=torch.float16, device=DEVICE)
    peers.add_rms_norm(x, x, x[0], EPS)
    assert peers.counts[BLOCKS : BLOCKS + 3].tolist() == [1, 1, 0]
