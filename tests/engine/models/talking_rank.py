"""A rank that says a few things to the others and checks what it hears, as a process of its own."""

import sys

import torch

from engine.kernels import reference
from engine.models.linear import Int8Linear
from engine.models.ranks import Ranks, leave
from engine.models.row_parallel import Int8RowParallel, RowParallel
from engine.runtime.rank_process import meet, run

CPU = torch.device("cpu")


def talk(ranks):
    rank, size = ranks.rank, ranks.size
    ours = torch.arange(6, dtype=torch.float32).view(2, 3) * (rank + 1)
    total = sum(range(1, size + 1))
    assert torch.equal(ranks.sum(ours.clone()), torch.arange(6.0).view(2, 3) * total)
    assert torch.equal(ranks.sum(ours.int()), torch.arange(6).view(2, 3).int() * total)
    assert torch.equal(ranks.max(ours * (-1) ** rank), torch.arange(6.0).view(2, 3))
    assert ranks.least((1 << 40) - rank, CPU) == (1 << 40) - size + 1
    assert ranks.agree(-7, CPU) and not ranks.agree(rank, CPU)
    gathered = ranks.gather(ours.t())  # which is not contiguous
    expected = torch.cat([torch.arange(6.0).view(2, 3).t() * (each + 1) for each in range(size)], dim=-1)
    assert torch.equal(gathered, expected if rank == 0 else ours.t())
    drawn = torch.full((3,), rank)
    ranks.share(drawn)
    assert drawn.tolist() == [0, 0, 0]
    layers(ranks)


class Counting:
    """A linear whose products are known."""

    def forward(self, x):
        return x * 2


def layers(ranks):
    """Linears that are cut along their inputs are what they are whole."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(5, 8 * ranks.size, generator=random)
    weight = torch.randint(-127, 128, (4, 8 * ranks.size), generator=random, dtype=torch.int8)
    scales, bias = torch.rand(4, generator=random), torch.rand(4, generator=random)
    mine = slice(8 * ranks.rank, 8 * ranks.rank + 8)
    cut = Int8RowParallel(Int8Linear(weight[:, mine].contiguous(), scales, bias), ranks)
    whole = Int8Linear(weight, scales, bias)
    assert torch.equal(cut.forward(x[:, mine]), whole.forward(x))
    gate, up = x, x.flip(0)
    gated = torch.cat([gate[:, mine], up[:, mine]], dim=1)
    for rows, whole_rows in (
        (cut.rows(x[:, mine]), reference.quantize_rows(x)),
        (cut.rows(gated, gated=True), reference.silu_and_mul_int8(torch.cat([gate, up], dim=1))),
    ):
        assert torch.equal(rows.values, whole_rows[0][:, mine]) and torch.equal(rows.scales, whole_rows[1])
    turned = Int8RowParallel(Int8Linear(weight[:, mine].contiguous(), scales, bias, rotated=8), ranks)
    rows = turned.rows(gated, gated=True)
    whole_rows = reference.silu_and_mul_int8(torch.cat([gate, up], dim=1), rotated=8)
    assert torch.equal(rows.values, whole_rows[0][:, mine]) and torch.equal(rows.scales, whole_rows[1])
    assert torch.equal(turned.forward(x[:, mine]), Int8Linear(weight, scales, bias, rotated=8).forward(x))
    for spoiled in (torch.nan, torch.inf):
        x[2, 3] = spoiled  # on rank 0 alone
        out = cut.forward(x[:, mine])
        assert out[2].isnan().all() and torch.equal(out[[0, 1, 3, 4]], whole.forward(x)[[0, 1, 3, 4]])
    ones = torch.ones(2, 2)
    assert torch.equal(RowParallel(Counting(), ranks).forward(ones), 2.0 * ranks.size * ones)


def work(task, channel):
    channel.send({"type": "loaded"})
    meet(task, CPU)
    talk(Ranks(task["rank"], task["size"]))
    channel.send({"type": "heard"})
    channel.receive(wait=True)
    leave()


if __name__ == "__main__":
    sys.exit(run(work))
