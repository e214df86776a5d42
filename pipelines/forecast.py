"""What a stage will take, said before it begins; a refusal where that is not there; and what it took, said after.

The figures after go to `build/runs/<stage>/<key>.json`, which is no output: outputs have the same bytes every time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from pipelines.machine import free_memory, measured, operations_a_second, usable_processors
from pipelines.quant.cost import Cost, Load
from pipelines.slices import Call, write_json
from pipelines.units import human_size, human_time

RUNS = "runs"
SPARE_BYTES = 128_000_000
"""What others on the machine may take while a stage runs."""


def load_of(config: ModelConfig, samples: int, length: int, device: str) -> Load:
    """What is streamed through a model on a device."""
    element = 4 if device == "cpu" or config.dtype == "float32" else 2
    return Load(
        samples=samples,
        length=length,
        workers=usable_processors(device),
        element=element,
        wide=8 if device == "cpu" else 4,
        device=device.partition(":")[0],
    )


def seconds_of(cost: Cost, load: Load, device: str) -> float:
    """How long it takes at the rates that this machine shows now."""
    dtype = torch.float32 if load.element == 4 else torch.float16
    return cost.seconds(load, *(operations_a_second(device, load.workers, one) for one in (dtype, torch.float32)))


@contextlib.contextmanager
def forecast(
    call: Call, stage: str, load: Load, cost: Callable[[Load, Mapping[str, Any]], Cost], options: Mapping[str, Any]
) -> Iterator[None]:
    """Say what `cost(load, options)` is before the block, and what it was after. ValueError where it does not fit.

    `options` are those of the recipe, which a refusal may propose others of; none for `calibrate`.
    """
    title, expected = f"{stage} {call.out.name}", cost(load, options)
    free = free_memory(call.device)
    check_fits(title, load, cost, options, device=call.device, free=free)
    seconds = seconds_of(expected, load, call.device)
    room = shutil.disk_usage(_existing(call.out)).free
    if expected.disk + expected.kept > room:
        raise ValueError(
            f"{title} writes {human_size(expected.disk)}, and keeps {human_size(expected.kept)} more while it runs;"
            f" {human_size(room)} are free. Free some room, or lower calibration.samples."
        )
    _say(f"{title}: forecast")
    _say(f"  memory  {human_size(expected.peak):>9} of {human_size(free)} free ({_largest_parts(expected)})")
    _say(f"  time    {human_time(seconds):>9}")
    disk = f"{human_size(room)} free, and {human_size(expected.kept)} until it is done"
    _say(f"  disk    {human_size(expected.disk):>9} of {disk}")
    with measured(call.device) as used:
        yield
    _say(f"{title}: took {human_size(used.memory)} of memory, {human_time(used.seconds)}")
    if call.out.parent.name == stage:
        record = {
            "device": call.device,
            "forecast": {"memory": dict(expected.memory), "seconds": seconds, "disk": expected.disk},
            "measured": {"memory": used.memory, "seconds": used.seconds},
            "load": dataclasses.asdict(load),
        }
        write_json(call.out.parent.parent / RUNS / stage / f"{call.out.name}.json", record)


def check_fits(
    title: str,
    load: Load,
    cost: Callable[[Load, Mapping[str, Any]], Cost],
    options: Mapping[str, Any],
    *,
    device: str,
    free: int,
) -> None:
    """ValueError where the memory that is free on a device is not enough, with what would make it enough."""
    expected = cost(load, options)

    def fits(other: Load, changed: Mapping[str, Any] = options) -> bool:
        return cost(other, changed).peak + SPARE_BYTES <= free

    if fits(load):
        return
    ways = []
    if (samples := _largest(lambda count: fits(dataclasses.replace(load, samples=count)), load.samples)) >= 1:
        ways.append(f"calibration.samples={samples}")
    if (length := _largest(lambda count: fits(dataclasses.replace(load, length=count)), load.length)) >= 16:
        ways.append(f"calibration.sequence_length={length}")
    for key, value in (("correction", 0.0), ("clip", False), ("method", "rtn")):
        if key in options and options[key] != value and fits(load, {**options, key: value}):
            ways.append(f"weights.{key}={str(value).lower()}")
    advice = (
        f"What fits: {' or '.join(ways)}."
        if ways
        else "Fewer or shorter samples do not help: it needs a machine with more memory, or a smaller model."
    )
    raise ValueError(
        f"{title} needs about {human_size(expected.peak)} of memory on {device} ({_largest_parts(expected)}), and"
        f" {human_size(max(free - SPARE_BYTES, 0))} can be had. Nothing was computed. {advice}"
    )


def _largest_parts(cost: Cost) -> str:
    parts = sorted(cost.memory.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {human_size(size)}" for name, size in parts)


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits, 0 where none does."""
    least, most = 0, below
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _existing(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
