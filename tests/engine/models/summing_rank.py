"""A rank on a GPU that adds up with the others what all of them know, as a process of its own."""

import sys

import torch

from engine.kernels import ops
from engine.models import ranks
from engine.models.ranks import Part, Ranks, leave
from engine.runtime.rank_process import meet, run

WIDTH, REPLAYS, EPS = 4096, 200, 1e-5


def given(rank, rows, dtype, device):
    random = torch.Generator().manual_seed(1000 * rank + rows)
    return torch.randn(rows, WIDTH, generator=random).to(device, dtype)


def add_up(group, device):
    """Sums and maxima of few rows and of many, which go another way, in a step and in a CUDA graph."""
    assert ranks._peers is not None, "these GPUs reach each other's memory"
    for rows in (1, 3, 64, 256, 1024, 2):
        for dtype in (torch.float16, torch.bfloat16):
            every = [given(rank, rows, dtype, device) for rank in range(group.size)]
            expected = sum(x.float() for x in every).to(dtype)
            assert ranks._peers.carry(expected) == (rows <= 256)
            assert torch.equal(group.sum(every[group.rank].clone()), expected)
            assert ranks._peers.carry_rows(expected) == (rows <= 256)
            stream, weight = (given(7, count, dtype, device) for count in (rows, 1))
            found = Part(every[group.rank].clone(), group).add_rms_norm(stream, weight[0], EPS)
            for one, other in zip(found, ops.add_rms_norm(expected, stream, weight[0], EPS), strict=True):
                assert torch.equal(one, other), (rows, dtype)
        maxima = [x[:, 0].float().contiguous() for x in every]
        assert torch.equal(group.max(maxima[group.rank].clone()), torch.stack(maxima).amax(0))
    replay(group, device)


def replay(group, device):
    """A graph of sums one after the other, with a norm and without, in which what one leaves is what the next takes."""
    sizes = (64, 64, 1, 256, 1, 64)
    xs = [given(group.rank, rows, torch.float16, device) for rows in sizes]
    outs = [torch.empty_like(x) for x in xs]
    first, weight = given(7, 256, torch.float16, device), given(7, 1, torch.float16, device)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        streams, norms = [], []
        for x, out in zip(xs, outs, strict=True):
            normed, stream = group.add_rms_norm(x, first[: len(x)], weight, EPS)
            group.sum(out.copy_(x))
            # At once behind the first, of what it leaves.
            again, stream = group.add_rms_norm(normed, stream, weight, EPS)
            streams.append(stream)
            norms.append(again)
    for turn in range(REPLAYS):
        for x, rows in zip(xs, sizes, strict=True):
            x.copy_(given(group.rank, rows, torch.float16, device) * (turn % 7))
        graph.replay()
        for out, stream, normed, rows in zip(outs, streams, norms, sizes, strict=True):
            every = [given(rank, rows, torch.float16, device) * (turn % 7) for rank in range(group.size)]
            whole = sum(x.float() for x in every).half()
            assert torch.equal(out, whole), turn
            once, expected = ops.add_rms_norm(whole, first[:rows], weight, EPS)
            twice, expected = ops.add_rms_norm((once.float() * group.size).half(), expected, weight, EPS)
            assert torch.equal(stream, expected) and torch.equal(normed, twice), turn
    torch.cuda.synchronize(device)


def work(task, channel):
    device = torch.device("cuda", task["rank"])
    torch.cuda.set_device(device)
    channel.send({"type": "loaded"})
    meet(task, device)
    add_up(Ranks(task["rank"], task["size"]), device)
    channel.send({"type": "heard"})
    [end] = channel.receive(wait=True)
    if end["leave"]:
        leave()


if __name__ == "__main__":
    sys.exit(run(work))
