"""Tensor-parallel ranks, processes that compute one model together, and what they say to each other: torch.distributed
with NCCL between GPUs and gloo between CPUs, over the loopback interface; small sums between GPUs that reach each
other's memory in a kernel of our own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from engine.kernels import ops

# How long a rank waits for another that is alive but says nothing; the death of one is seen at once.
PATIENCE = timedelta(minutes=10)
LOOPBACK = "127.0.0.1"

# `engine.kernels.peer_sum.Peers` of the group that this process is in, where its GPUs reach each other's memory.
_peers: Any = None


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank of the group that this process is in. Every method is called by all ranks, in one order."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in x: the same bits on all ranks."""
        if _peers is not None and x.dtype != torch.float32 and _peers.carry(x):
            return _peers.sum(x)  # type: ignore[no-any-return]
        dist.all_reduce(x)
        return x

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`ops.add_rms_norm` of the sum of every rank's x [T, hidden], which is lost."""
        if _peers is not None and _peers.carry_rows(x):
            return _peers.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]
        return ops.add_rms_norm(self.sum(x), residual, weight, eps)

    def max(self, x: Tensor) -> Tensor:
        """The largest of every rank's x, value by value, in x."""
        if _peers is not None and x.dtype == torch.float32 and _peers.carry(x):
            return _peers.max(x)  # type: ignore[no-any-return]
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


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank has of a sum over all of them, x [T, hidden], that is still to be made: once, by one of these."""

    x: Tensor
    ranks: Ranks

    def whole(self) -> Tensor:
        return self.ranks.sum(self.x)

    def add_rms_norm(self, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.ranks.add_rms_norm(self.x, residual, weight, eps)


def whole(x: Tensor | Part) -> Tensor:
    """x, its sum made where that is still to do."""
    return x.whole() if isinstance(x, Part) else x


def add_rms_norm(x: Tensor | Part, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm` of `whole(x)`."""
    if isinstance(x, Part):
        return x.add_rms_norm(residual, weight, eps)
    return ops.add_rms_norm(x, residual, weight, eps)


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
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
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
    if on_gpu:
        global _peers
        _peers = _meet_in_memory(rank, size, device)


def _meet_in_memory(rank: int, size: int, device: torch.device) -> Any:
    """The `Peers` of the group; None, and a word from rank 0, where one of its GPUs does not reach another's memory."""
    made, why = None, ""
    try:
        kernels = importlib.import_module("engine.kernels.peer_sum")
        memory = importlib.import_module("torch.distributed._symmetric_memory")._SymmetricMemory
        words = kernels.inbox_words(size)
        inbox = memory.empty_strided_p2p((words,), (1,), torch.int64, device).zero_()
        torch.cuda.synchronize(device)
        meeting = memory.rendezvous(inbox, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        if meeting.buffer_ptrs[rank] != inbox.data_ptr():
            raise RuntimeError("symmetric memory begins elsewhere")
        places = torch.tensor(meeting.buffer_ptrs, device=device)
        counts, stop = (torch.zeros(count, dtype=torch.int32, device=device) for count in (kernels.COUNTS, 1))
        alarm = torch.ones(1, dtype=torch.int32).pin_memory(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        made = kernels.Peers(rank, size, places, counts, stop, holds=(*alarm, (inbox, meeting)))
    except (ImportError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}"
    if Ranks(rank, size).least(made is not None, device):
        return made
    if rank == 0:
        why = why or "another rank says so"
        sys.stderr.write(f"ingot: GPUs that do not reach each other's memory, so NCCL makes all sums ({why}).\n")
    return None


def abort() -> None:
    """What this process waits for in its group ends soon, with results that mean nothing: of ranks that are gone. May
    take as long as the device does."""
    if not on_gpus():
        return
    if _peers is not None:
        one, stream, _ = _peers.holds
        with torch.cuda.stream(stream):
            _peers.stop.copy_(one, non_blocking=True)
    with contextlib.suppress(Exception):  # it may have seen the death itself, and be at it
        dist.distributed_c10d._abort_process_group()


def joined() -> bool:
    """Whether this process is in a group."""
    return dist.is_initialized()


def on_gpus() -> bool:
    """Whether it is one of GPUs."""
    return joined() and dist.get_backend() == "nccl"


def leave() -> None:
    """End the group of this process. One of GPUs must be whole: its end waits for ranks that are gone, and for CUDA
    graphs with its sums in them."""
    global _peers
    _peers = None
    if joined():
        dist.destroy_process_group()


def loopback_interface() -> str:
    """The name of the loopback interface: lo on Linux, lo0 on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")
