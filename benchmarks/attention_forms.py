"""`ingot bench attention`: both forms of decode attention beside each other, from one short context to many long."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import option, read_options
from benchmarks.shapes import SHAPES, shape

ABOUT = """
Times decode attention of one layer in its two forms, `split` (a program takes a part of one context) and `walk` (a
fixed number of programs share the blocks of all contexts), over caches in float16 (kv16) and int8 with scales of
channels (kv8) and of tokens (kv8-token), at several batches and contexts. A line a case: microseconds, TB/s of K and V
read and their share of what a copy reaches (measured first), without and with rotation and the write of K and V before
it (split: a kernel of its own; walk: inside). What differs from the proven form by more than rounding is said and not
taken. Then what int8 by token costs beside by channel, and, with write=true, rows for the table of this device.
"""
# As computed; int8 with scales of channels; int8 with scales of tokens: `attention_cases.CACHES`.
CACHES = ("kv16", "kv8", "kv8-token")
# Sequences and the tokens of each; 0: unequal ones, as requests of ShareGPT are.
CONTEXTS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (512, 2048)),
    (16, (272,)),
    (64, (272, 1024)),
    (256, (16, 272, 528, 0)),
)
# The sizes of the table that a batch stands for.
SIZES = {1: (1, 2, 4, 8), 16: (16, 32), 64: (64,), 256: (128, 256, 512)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    shape: str = option("internlm7b", "the model whose heads are taken", choices=tuple(SHAPES))
    caches: tuple[str, ...] = option(CACHES, "kinds of cache")
    write: bool = option(False, "write the fastest into the table of this device")
    device: str = option("auto", "cuda or cuda:N")
    out: Path | None = option(None, "the folder of the table; the engine's own, where left out")


@dataclass(frozen=True, slots=True)
class Way:
    """A form with its configuration, and microseconds without (`alone`) and with rotation (`turned`)."""

    form: str
    config: Mapping[str, Any]
    alone: float
    turned: float


def main(argv: list[str]) -> int:
    options = read_options(Options, argv, prog="ingot bench attention", about=ABOUT)
    if unknown := [kv for kv in options.caches if kv not in CACHES]:
        raise ValueError(f"caches={unknown[0]} is not known; there are {', '.join(CACHES)}.")
    import torch

    from benchmarks.subject import find_device

    device = find_device(options.device)
    if not device.startswith("cuda"):
        raise ValueError("forms of attention are timed on a GPU, and this machine has none.")
    from benchmarks.attention_ways import Case
    from benchmarks.ceilings import measure_ceilings
    from engine.kernels import tune, tuning
    from engine.kernels.device import facts

    config = shape(options.shape)
    copy = measure_ceilings(device, torch.float16).copy
    print(f"{facts(torch.device(device)).name}: a copy reaches {copy / 1e12:.2f} TB/s", flush=True)
    best: dict[tuple[int, int, str], float] = {}
    rows: list[dict[str, Any]] = []
    for batch, contexts in CONTEXTS:
        for kv in options.caches:
            timed: list[list[Way]] = []
            for context in contexts:
                with torch.inference_mode():
                    case = Case(config, device, kv, lengths(batch, context))
                    timed.append(list(case.ways(print)))
                torch.cuda.empty_cache()
                best[batch, context, kv] = min(way.alone for way in timed[-1])
                print(line(f"{name(batch, context)} {kv}", timed[-1], case.bytes, copy), flush=True)
            us, chosen = choose(timed)
            where = {"op": f"decode_{case.kind}_{case.stored}", "n": config.num_kv_heads, "k": config.head_dim}
            rows += [{**where, "m": size, "us": us, "config": chosen} for size in SIZES[batch]]
    for text in granularities(best):
        print(text)
    for row in rows:
        print(f"{row['op']} m={row['m']}: {row['config']}")
    if options.write:
        folder = options.out or tuning.TABLES
        print(tuning.write(facts(torch.device(device)).name, rows, tune.versions(), folder))
    return 0


def lengths(batch: int, context: int) -> list[int]:
    """`batch` contexts: all of `context` tokens, or for 0 unequal ones: a log-normal prompt, and as much of an answer
    as one that is looked at by chance has."""
    if context:
        return [context] * batch
    draw = random.Random(0)

    def tokens() -> int:
        return min(max(4, int(draw.lognormvariate(math.log(230) - 0.4, 0.9))), 1024)

    return [tokens() + draw.randrange(tokens()) for _ in range(batch)]


def name(batch: int, context: int) -> str:
    return f"{batch} x {context}" if context else f"{batch} x unequal ({sum(lengths(batch, 0)) // batch})"


def line(case: str, ways: Sequence[Way], size: int, copy: float) -> str:
    """The proven form, and the fastest of the other, alone and with rotation."""
    parts = [case.ljust(30)]
    for form in ("split", "walk"):
        found = [way for way in ways if way.form == form]
        if not found:
            parts.append(f"{form}: none")
            continue
        way, turned = min(found, key=lambda each: each.alone), min(found, key=lambda each: each.turned)
        speed = size / way.alone * 1e6
        known = {key: value for key, value in way.config.items() if key != "form"}
        told = "/".join(map(str, known.values()))
        parts.append(
            f"{form} {way.alone:7.1f} us {speed / 1e12:.2f} TB/s {speed / copy:4.0%} ({told}), "
            f"with rotation {turned.turned:7.1f} us"
        )
    return " | ".join(parts)


def choose(timed: Sequence[Sequence[Way]]) -> tuple[float, dict[str, Any]]:
    """Of the ways that all cases of a batch have: the least sum of times with rotation, each beside the fastest of its
    case; microseconds in the first case and the configuration."""
    fastest = [min(way.turned for way in ways) for ways in timed]
    by_config = [{tuple(sorted(way.config.items())): way for way in ways} for ways in timed]
    shared = [key for key in by_config[0] if all(key in ways for ways in by_config)]

    def cost(key: tuple[Any, ...]) -> float:
        return sum(ways[key].turned / least for ways, least in zip(by_config, fastest, strict=True))

    best = by_config[0][min(shared, key=cost)]
    config = dict(best.config)
    if best.form == "walk":
        config["turns"] = 1
    return round(best.alone, 2), config


def granularities(best: Mapping[tuple[int, int, str], float]) -> list[str]:
    """What int8 with scales of tokens takes, of what it takes with scales of channels, by the faster form of each."""
    lines = []
    for (batch, context, kv), us in best.items():
        token = best.get((batch, context, "kv8-token"))
        if kv == "kv8" and token is not None:
            lines.append(f"{name(batch, context)}: token takes {token / us:.2f} of channel's time")
    return lines
