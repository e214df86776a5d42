"""What an int8 KV cache costs by its granularity: the same tokens through each, beside the cache as computed.

    python -m benchmarks.kv_quality DATA [--models NAME ...] [--blocks 32 128] [--items N] [--device cuda]

Items, calibration texts and DATA are those of `benchmarks.recipe_quality`; weights are the checkpoint's, in float32.
A row has the change of perplexity with its standard error over the scored tokens, and the mean divergence
KL(as computed || int8) of whole distributions, which no luck with single tokens can make small. Fewer blocks of a
calibration are the first ones of the more. More items than the 100 stories or 40 answers of the tables are taken from
what calibration would else draw from, for a smaller standard error.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.recipe_quality import ANSWERS, MODELS, Item, answers, decoder, one_page, scales_of, stories
from benchmarks.rows import append, commit
from engine.config import KVGranularity
from engine.models.batch import packed
from engine.models.cache import KVCache, KVScales, PerToken
from engine.models.decoder import Decoder
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint
from pipelines.calibrate import calibrate
from pipelines.quant.stream import side_by_side
from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results" / "kv_quality.csv"
Scales = KVScales | PerToken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS)[:2], choices=list(MODELS)[:2])
    parser.add_argument("--blocks", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--items", type=int, help="stories or answers that are scored (100, 40)")
    parser.add_argument(
        "--granularities", nargs="+", default=list(get_args(KVGranularity)), choices=get_args(KVGranularity)
    )
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    run = commit()  # once: the tree may move on while the code that was loaded runs
    for name in arguments.models:
        with torch.inference_mode():
            measure_model(arguments, name, sorted(arguments.blocks), run)
    return 0


def measure_model(arguments: argparse.Namespace, name: str, blocks: Sequence[int], run: str) -> None:
    """A row for each granularity and number of calibration blocks."""
    data, count, device, asked = arguments.data, arguments.items, arguments.device, arguments.granularities
    checkpoint = Checkpoint(data / "models" / name)
    tokenizer, config = Tokenizer(checkpoint.folder), checkpoint.config
    if name.startswith("stories"):
        items, tokens = stories(data, tokenizer, blocks[-1], max(count or 0, 100))
    else:
        items, tokens = answers(data / ANSWERS, tokenizer, blocks[-1], max(count or 0, 40))
    items = items[:count]
    caches: dict[tuple[str, int], Scales] = {("token", 0): PerToken()} if "token" in asked else {}
    ranges: dict[str, Tensor] = {}
    for first, last in zip([0, *blocks], blocks, strict=False):
        with side_by_side() as workers:
            more = calibrate(checkpoint, tokens[first:last], workers)
        ranges = joined(ranges, {key: value for key, value in more.items() if key.startswith(("key/", "value/"))})
        for granularity in [one for one in get_args(KVGranularity)[:3] if one in asked]:
            caches[granularity, last] = scales_of(ranges, config, granularity)
    model = decoder(checkpoint, Path("none"), device)
    for (granularity, used), measured in compare(model, items, caches).items():
        row: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": run,
            **{tool: version for tool, version in toolchain().items() if version},
            "model": name,
            "granularity": granularity,
            "blocks": used or "",
            **measured,
        }
        append(RESULTS, row if device == "cpu" else row | {"device": torch.cuda.get_device_name()})
        print(
            f"| {name} | {granularity} | {used or ''} | {measured['change_percent']:+.3f}% ± "
            f"{measured['error_percent']:.3f} | {measured['kl_mean']:.2e} |",
            flush=True,
        )


def joined(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ranges of both parts of a calibration together."""
    if not left:
        return right
    take: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"min": torch.minimum}
    return {key: take.get(key.split("/")[1], torch.maximum)(left[key], right[key]) for key in left}


def compare(model: Decoder, items: Sequence[Item], caches: dict[Any, Scales]) -> dict[Any, dict[str, float]]:
    """What each cache costs on the scored tokens of the items."""

    def one(index: int) -> tuple[Tensor, dict[Any, tuple[Tensor, float]]]:
        ids, first = items[index]
        wanted = torch.tensor(ids[first:], device=model.device)[:, None]
        exact, found = log_probabilities(model, ids, first, None), {}
        for key, scales in caches.items():
            here = log_probabilities(model, ids, first, scales)
            divergence = float((exact.exp() * (exact - here)).sum())
            found[key] = (exact.gather(1, wanted) - here.gather(1, wanted)).squeeze(1).cpu(), divergence
        return exact.gather(1, wanted).squeeze(1).cpu(), found

    with side_by_side(device=model.device.type) as workers:
        seen = list(workers.in_order(one, len(items)))
    loss = -torch.cat([exact for exact, _ in seen]).double()
    rows = {}
    for key in caches:
        more = torch.cat([found[key][0] for _, found in seen]).double()
        rows[key] = {
            "tokens": len(more),
            "perplexity_as_computed": round(math.exp(float(loss.mean())), 5),
            "change_percent": round(100 * math.expm1(float(more.mean())), 4),
            "error_percent": round(100 * float(more.std()) / math.sqrt(len(more)), 4),
            "kl_mean": float(f"{sum(found[key][1] for _, found in seen) / len(more):.4g}"),
        }
    return rows


def log_probabilities(model: Decoder, ids: list[int], first: int, scales: Scales | None) -> Tensor:
    """Of the scored positions: [tokens, vocabulary]."""
    batch, cache = packed([ids], device=model.device), None
    if scales is not None:
        batch = one_page(batch)
        cache = KVCache(
            model.config, num_pages=1, page_len=len(ids), device=model.device, dtype=torch.float32, scales=scales
        )
    return model(batch, cache)[first - 1 : -1].log_softmax(-1)


if __name__ == "__main__":
    raise SystemExit(main())
