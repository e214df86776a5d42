"""Calibration blocks on their way through the model, one layer in memory at a time, samples side by side.

Each sample is computed by one thread alone and samples are joined in their order, so the number of threads
changes the time and no bit.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import DecoderLayer
from engine.models.rope import rope_tables
from engine.storage.checkpoint import Checkpoint
from pipelines.quant.observers import KEY, VALUE, Observer, Statistics, join

Result = TypeVar("Result")


class Workers:
    """Threads that compute side by side, each operation of theirs with one thread."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool = pool
        self._count = count

    def in_order(self, one: Callable[[int], Result], count: int) -> Iterator[Result]:
        """`one(i)` for i < count, in order, with no more results in memory than there are threads."""
        for first in range(0, count, self._count):
            yield from self._pool.map(one, range(first, min(first + self._count, count)))


@contextmanager
def side_by_side(count: int | None = None, *, device: str = "cpu") -> Iterator[Workers]:
    """`count` workers (None: one per usable processor, or one for a GPU). In here, too, an operation has one thread."""
    count = count or (len(os.sched_getaffinity(0)) if device == "cpu" else 1)
    _give_memory_back()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=_compute_alone) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(before)


def _give_memory_back() -> None:
    """Make glibc map every block above 4 MB on its own and unmap it when it is freed.

    Left alone it raises that size to 32 MB as blocks are freed, and its heap then keeps holes in the sizes of weights.
    Smaller blocks are reused, because handing out pages takes time: with 1 MB a quarter of it on a model of 26 million
    parameters, with 4 MB a tenth. With 16 MB less still, and peaks beyond the forecast.
    """
    if sys.platform == "linux":
        mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 22)


def _compute_alone() -> None:
    # Both are kept per thread: a new thread starts with the processors' number and with gradients on.
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


class LayerTensors(Mapping[str, Tensor]):
    """The tensors of one layer as stored, by their names within it; each is read and checked when it is asked for.

    So no more of the file is in memory than what is being looked at. ValueError names a tensor with NaN or Inf values.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, device: torch.device | str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._places = checkpoint.layer_names(layer)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._checkpoint.tensor(self._places[name]).to(self._device)
        if not all(bool(torch.isfinite(end)) for end in tensor.aminmax()):
            raise ValueError(
                f"{self._places[name]} of {self._checkpoint.folder} has NaN or Inf values: the checkpoint is damaged. "
                "Fetch it again or mend that tensor."
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Stream:
    """The hidden states of all blocks before the layer that comes next: `hidden`, [T, hidden] per block.

    They are float32 on a CPU, and of the checkpoint's own type on a GPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, blocks: Tensor, workers: Workers, *, device: torch.device | str = "cpu"
    ) -> None:
        """`blocks` are token ids [samples, T]; ValueError for an id outside the model's vocabulary."""
        config = checkpoint.config
        if int(blocks.max()) >= config.vocab_size or int(blocks.min()) < 0:
            raise ValueError(
                f"The calibration blocks hold token {int(blocks.max())}, but {checkpoint.folder} has "
                f"{config.vocab_size} tokens: its tokenizer does not belong to its weights."
            )
        self.config = config
        self.workers = workers
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "cpu" else getattr(torch, config.dtype)
        self.batch = packed([blocks[0].tolist()], device=self.device)
        self.rope = rope_tables(config, self.batch)
        embedding = checkpoint.tensor(names.EMBEDDING)
        self.hidden = [embedding[block.long()].to(self.device, self.dtype) for block in blocks]

    def dense(self, tensors: Mapping[str, Tensor]) -> DecoderLayer:
        """A layer of these tensors that computes where the hidden states are and in their type."""
        return DecoderLayer(self.config, tensors, device=self.device, dtype=self.dtype)

    def observe(
        self, layer: DecoderLayer, number: int, observer: Callable[[], Observer], *, advance: bool
    ) -> dict[str, Statistics]:
        """What a fresh `observer()` sees in each sample, joined over all; `advance` moves the hidden states on as well.

        `number` is the layer's place, for the message of the ValueError that NaN or Inf in an activation raises.
        """

        def one(sample: int) -> tuple[Tensor, dict[str, Statistics]]:
            watching = observer()
            out = layer(self.hidden[sample], self.batch, None, self.rope, observe=watching)
            return out, watching.seen

        joined: dict[str, Joined] = {}
        for sample, (out, seen) in enumerate(self.workers.in_order(one, len(self.hidden))):
            for module, statistics in seen.items():
                joined.setdefault(module, Joined()).add(statistics)
            if advance:
                self.hidden[sample] = out
        return {module: sums.checked(number, module) for module, sums in joined.items()}

    def state(self) -> dict[str, Tensor]:
        """The hidden states, as what a run that was killed needs to go on after the layer before (`Resume`)."""
        return {f"hidden/{sample}": hidden for sample, hidden in enumerate(self.hidden)}

    def restore(self, read: Callable[[str], Tensor]) -> None:
        """Take the hidden states that `state` had given."""
        for sample in range(len(self.hidden)):
            self.hidden[sample] = read(f"hidden/{sample}").to(self.device)

    def advance(self, layer: DecoderLayer) -> None:
        """Move every hidden state through the layer."""

        def one(sample: int) -> Tensor:
            return layer(self.hidden[sample], self.batch, None, self.rope)

        for sample, out in enumerate(self.workers.in_order(one, len(self.hidden))):
            self.hidden[sample] = out


class Joined:
    """Statistics of samples, joined as they come; whether they are finite is asked once, at the end.

    A question a sample would make a GPU wait for its answers.
    """

    def __init__(self) -> None:
        self._statistics: Statistics | None = None
        self._finite: list[Tensor] = []

    def add(self, statistics: Statistics) -> None:
        """Join what was seen in the next sample."""
        # A Gram matrix that is not finite has a diagonal that is not.
        sums = [
            (values.diagonal() if name == "gram" else values).sum()
            for name, values in statistics.items()
            if name != "tokens"  # a number on the CPU
        ]
        self._finite.append(torch.stack(sums).isfinite().all())
        self._statistics = statistics if self._statistics is None else join(self._statistics, statistics)

    def checked(self, layer: int, module: str) -> Statistics:
        """Everything joined. ValueError that names layer, module and sample where NaN or Inf was seen."""
        assert self._statistics is not None
        finite = torch.stack(self._finite).tolist()
        if all(finite):
            return self._statistics
        what = {KEY: "the keys of self_attn", VALUE: "the values of self_attn"}.get(module, f"the input of {module}")
        raise ValueError(
            f"Layer {layer}: {what} has NaN or Inf values in calibration sample {finite.index(False)}. The weights up "
            "to there overflow on this text: check the checkpoint, or calibrate on other text."
        )
