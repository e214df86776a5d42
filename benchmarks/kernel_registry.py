"""The cases that `ingot bench kernels` times. A module adds its own by registering a function that yields them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.config import ROTATIONS, ModelConfig

# Modules that register cases when they are imported; one that times further kernels is named here.
MODULES = ("benchmarks.row_cases", "benchmarks.linear_cases", "benchmarks.attention_cases")
REFERENCE = "engine.kernels.reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What cases are made for: a model's shape, the rows of a step, cached tokens a sequence, and where."""

    config: ModelConfig
    tokens: int
    context: int
    group_size: int
    device: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one size.

    `inputs` makes a set of arguments; each of `run`, by the name of the implementation, is called with one. `bytes` and
    `operations` are what cannot be avoided: every input and output once, and two a multiplied pair, of int8 numbers
    with `int8`. The implementations of `eager` ask the host in between and cannot be captured in a CUDA graph.
    """

    kernel: str
    size: str
    inputs: Callable[[], tuple[Any, ...]]
    run: Mapping[str, Callable[..., object]]
    bytes: int
    operations: int = 0
    int8: bool = False
    eager: tuple[str, ...] = ()


Provider = Callable[[Setting], Iterable[Case]]
_PROVIDERS: dict[str, Provider] = {}


def register(kernel: str) -> Callable[[Provider], Provider]:
    """Decorates the function that yields the cases of `kernel`."""

    def keep(provider: Provider) -> Provider:
        _PROVIDERS[kernel] = provider
        return provider

    return keep


def kernels() -> tuple[str, ...]:
    """The names of all kernels that have cases."""
    for module in MODULES:
        importlib.import_module(module)
    # In the order above, whichever of them was imported first.
    known = (*MODULES, *(provider.__module__ for provider in _PROVIDERS.values()))
    return tuple(sorted(_PROVIDERS, key=lambda kernel: known.index(_PROVIDERS[kernel].__module__)))


def cases(kernel: str, setting: Setting) -> Iterator[Case]:
    """The cases of a kernel; ValueError names those that there are."""
    if kernel not in kernels():
        raise ValueError(f"kernels={kernel} is not known; there are {', '.join(kernels())}.")
    yield from _PROVIDERS[kernel](setting)


def values(setting: Setting, *shape: int) -> Tensor:
    """Normal random numbers in the computing type."""
    return torch.randn(shape, device=setting.device).to(setting.dtype)


def with_rotation(case: Case) -> Case:
    """The same of inputs that are rotated before they are rounded, as w8a8's down_proj reads them."""
    run = {name: functools.partial(function, rotated=ROTATIONS[-1]) for name, function in case.run.items()}
    return replace(case, size=f"{case.size} rotated", run=run)


def implementations(
    op: str, device: str, *modules: str, reference: str = REFERENCE
) -> dict[str, Callable[..., object]]:
    """The function `op` of the module `reference`, by that name, and of those `modules` that are there and have it, by
    the module's own.

    The others are Triton's: on a CPU they are left out.
    """
    plain = importlib.import_module(reference)
    found = {"reference": getattr(plain, op)} if hasattr(plain, op) else {}
    if device.startswith("cuda"):
        for name in modules:
            if importlib.util.find_spec(name) and hasattr(module := importlib.import_module(name), op):
                found[name.rpartition(".")[2]] = getattr(module, op)
    return found
