"""Tensor-parallel ranks, processes that compute one model together, and what they say to each other: torch.distributed
with NCCL between GPUs and gloo between CPUs, over the loopback interface.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# How long a rank waits for another that is alive but says nothing; the death of one is seen at once.
PATIENCE = timedelta(minutes=10)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank of the group that this process is in. Every method is called by all ranks, in one order."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in x: the same bits on all ranks."""
        dist.all_reduce(x)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of every rank's x, value by value, in x."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of every rank's number."""
        told = torch.tensor(number, dtype=torch.int64, device=device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return int(told)

    def agree(self, number: int, device: torch.device) -> bool:
        """Whether all ranks say the same number."""
        return self.least(number, device) == -self.least(-number, device)

    def share(self, x: Tensor) -> None:
        """Rank 0's x, in the x of all ranks."""
        dist.broadcast(x, src=0)

    def gather(self, x: Tensor) -> Tensor:
        """On rank 0 the x of all ranks side by side, along the last dimension; on the others their own."""
        x = x.contiguous()
        pieces = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, pieces, dst=0)
        return x if pieces is None else torch.cat(pieces, dim=-1)


def open_store(size: int) -> TCPStore:
    """Where ranks find each other, at rank 0: on a free port of the loopback interface."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    port = listener.getsockname()[1]
    listener.listen(size)
    # The store would listen on every interface: it is given a socket that does not.
    return TCPStore(
        LOOPBACK,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=PATIENCE,
        master_listen_fd=listener.detach(),
    )


def find_store(port: int, size: int) -> TCPStore:
    """The store of rank 0, as the others see it."""
    return TCPStore(LOOPBACK, port, size, is_master=False, wait_for_workers=False, timeout=PATIENCE)


def join(store: TCPStore, rank: int, size: int, device: torch.device) -> None:
    """Become a rank of the group that meets at `store`; returns when all are there. A process is in one group."""
    on_gpu = device.type == "cuda"
    # NVLink's multicast is for sums larger than ours, and a fault in it stops the GPUs of the whole host.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    interface = "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
    said = interface in os.environ
    os.environ.setdefault(interface, loopback_interface())
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
            device_id=device if on_gpu else None,
        )
    finally:
        if not said:
            del os.environ[interface]


def joined() -> bool:
    """Whether this process is in a group."""
    return dist.is_initialized()


def on_gpus() -> bool:
    """Whether it is one of GPUs."""
    return joined() and dist.get_backend() == "nccl"


def leave() -> None:
    """End the group of this process. One of GPUs must be whole: its end waits for ranks that are gone, and for CUDA
    graphs with its sums in them."""
    if joined():
        dist.destroy_process_group()


def loopback_interface() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")
