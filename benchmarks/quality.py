"""Quality of the ladder on real models, through artifacts and the engine that serves them. Appends rows to a file.

    python -m benchmarks.quality DATA [--models stories15M-llama ...] [--recipes fp16 fp16-kv8 w4a16 w4a16-kv8]

DATA is a folder with `models/<name>`, STORIES and ANSWERS. The items are those of published baselines: the first 100
stories, each BOS and tokens cut to the model's positions; the first 40 answers inside the chat template, at most 256
tokens of each. Calibration takes 32 blocks of what follows them. The ratio's interval is over items, at 95%.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import append, commit
from engine.runtime.tokenizer import Tokenizer
from pipelines import calibrate, export, quantize, shard
from pipelines.baseline import ask_checkpoint
from pipelines.evaluate import evaluate
from pipelines.evaluation.kept import Baseline
from pipelines.evaluation.texts import Item, Question, answer_items, document_items
from pipelines.recipe_fields import weights_part
from pipelines.schema import KV, Weights
from pipelines.slices import PATHS, Call
from pipelines.sources import folder_digest, text_digest
from pipelines.toolchain import toolchain

RESULTS = Path(__file__).parent / "results" / "quality.csv"
STORIES = "text/tinystories_train_head_2MiB.txt"
ANSWERS = "prompts/llamafactory_alpaca_zh_demo.json"
# Model -> positions that an item may take, and the group size of its 4-bit weights (none fits stories260K).
MODELS = {"stories15M-llama": (256, 96), "stories260K-llama": (512, 0), "minimind2-small-llama": (512, 128)}
RECIPES = ("fp16", "fp16-kv8", "w4a16", "w4a16-kv8")
SAMPLES = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args()
    print(
        "| model | recipe | perplexity | ratio | KL mean | KL p99 | top-1 | bytes |\n|---|---|---|---|---|---|---|---|"
    )
    tested = commit()  # asked before the current folder is a temporary one
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            measure_model(arguments.data.resolve(), name, arguments.recipes, tested)
    return 0


def measure_model(data: Path, name: str, recipes: Sequence[str], tested: str) -> None:
    """A row for each recipe of one model that a group size fits. Builds in the current folder."""
    source, (length, group_size) = data / "models" / name, MODELS[name]
    tokenizer = Tokenizer(source)
    items, rest = (stories if name.startswith("stories") else answers)(data, tokenizer, length)
    Path("calibration.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rest), encoding="utf-8")
    slices = source_slices(source, Path("calibration.jsonl"), length)
    baseline = ask_checkpoint(source, tokenizer, items, [], answer_tokens=1)
    calibrated = run(calibrate, "calibrate", slices)
    for recipe in recipes:
        weights, _, kv = recipe.partition("-")
        if weights == "w4a16" and not group_size:
            continue
        chosen = weights_part(Weights(name=weights, group_size=group_size))
        content = {
            **slices,
            "weights": {"group_size": 0, **chosen},
            "tp": 1,
            "name": name,
            "session_len": 0,
            "recipe": {
                "weights": weights,
                "kv": kv or "kv16",
                "group_size": chosen.get("group_size", 0),
                "kv_granularity": KV().granularity if kv else "tensor",
                "rotate_down": chosen.get("rotate_down", 0),
            },
            "kv": {"name": kv or "kv16", "granularity": KV().granularity, "symmetric": False},
            "calibration": None,
        }
        quantized = run(quantize, f"quantize-{weights}", content, calibrate=calibrated)
        sharded = run(shard, f"shard-{weights}", content, quantize=quantized)
        artifact = run(export, f"export-{recipe}", content, shard=sharded, quantize=quantized, calibrate=calibrated)
        record(name, recipe, artifact, baseline, content, tested, calibrated)


def stories(data: Path, tokenizer: Tokenizer, length: int) -> tuple[list[Item], list[str]]:
    """The items to score, and the texts to calibrate on."""
    texts = [text for text in (data / STORIES).read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]
    return document_items(texts[:100], tokenizer, length=length, max_tokens=100 * length), texts[100:]


def answers(data: Path, tokenizer: Tokenizer, length: int) -> tuple[list[Item], list[str]]:
    """The items to score, and the texts to calibrate on. `length` bounds neither: the prompts are what they are."""
    questions = []
    for row in json.loads((data / ANSWERS).read_text(encoding="utf-8")):
        asked = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
        prompt = tokenizer.chat([{"role": "user", "content": asked}])
        ids = tuple(tokenizer.encode(prompt, add_special=False))
        questions.append(Question(prompt=prompt, prompt_ids=ids, answer=row["output"]))
    items = answer_items(questions[:40], tokenizer, max_answer_tokens=256)
    return items, [question.prompt + question.answer for question in questions[40:]]


def source_slices(source: Path, text: Path, length: int) -> dict[str, Any]:
    """What the slices of all stages say about the sources, whose places are written to where stages look for them."""
    digests = {path.resolve(): digest for path, digest in ((source, folder_digest(source)), (text, text_digest(text)))}
    PATHS.parent.mkdir(parents=True, exist_ok=True)
    PATHS.write_text(json.dumps({f"sha256:{digest}": str(path) for path, digest in digests.items()}))
    model, calibration = (
        {"kind": kind, "digest": d} for kind, d in zip(("folder", "text"), digests.values(), strict=True)
    )
    drawn = {"samples": SAMPLES, "sequence_length": length, "sampling": "random", "seed": 42}
    return {"model": model, "calibration": {"text": {**calibration, "column": "text"}, **drawn}}


def run(stage: Any, out: str, content: dict[str, Any], **inputs: Path) -> Path:
    """The output of a stage, made once."""
    path = Path(out).resolve()
    if not path.exists():
        with contextlib.redirect_stdout(None):
            stage.work(Call(slice=content, out=path, inputs=inputs))
    return path


def record(
    name: str,
    recipe: str,
    artifact: Path,
    baseline: Baseline,
    content: dict[str, Any],
    tested: str,
    calibrated: Path,
) -> None:
    """Evaluate the artifact, append its row, and print it."""
    evaluation = {"name": name, "gates": {"confidence": 0.95}}
    asked = {"evaluation": evaluation, "recipe": content["recipe"], "toolchain": toolchain()}
    statement, _ = evaluate(artifact, baseline, asked, calibration=calibrated)
    predicate = statement["predicate"]
    metrics, sizes = predicate["metrics"], predicate["sizes"]
    ratio = metrics["perplexity_ratio"]
    figures = {metric: metrics[metric]["value"] for metric in ("perplexity", "kl_mean", "kl_p99", "top1_agreement")}
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": tested,
        **{tool: version for tool, version in toolchain().items() if version},
        "model": name,
        "recipe": recipe,
        "group_size": content["recipe"]["group_size"],
        "items": len(baseline.items),
        "tokens": len(baseline.losses),
        "base_perplexity": round(metrics["perplexity_base"]["value"], 5),
        **{metric: round(value, 6) for metric, value in figures.items()},
        "ratio": round(ratio["value"], 6),
        "ratio_low": round(ratio["low"], 6),
        "ratio_high": round(ratio["high"], 6),
        "artifact_bytes": sizes["artifact_bytes"],
        "kv_bytes_per_token": sizes["kv_bytes_per_token"],
    }
    append(RESULTS, row)
    print(
        f"| {name} | {recipe} | {row['perplexity']:.5f} | {row['ratio']:.5f} ({row['ratio_low']:.5f} to "
        f"{row['ratio_high']:.5f}) | {row['kl_mean']:.6f} | {row['kl_p99']:.4f} | {row['top1_agreement']:.4f} | "
        f"{row['artifact_bytes']} |",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
