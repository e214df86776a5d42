from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.random_weights import RandomWeights, random_kv_scales, weight_bytes
from benchmarks.shapes import shape
from cli.main import main
from engine.config import Recipe
from engine.models.cache import KVCache

TINY = shape("tiny")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(weights="w8a8"),
        Recipe(weights="w4a16", group_size=64),
        Recipe(weights="w4a16", group_size=32, head="int4"),
    ],
    ids=str,
)
def test_weights_are_counted_to_the_byte(recipe: Recipe) -> None:
    for config in (TINY, replace(TINY, tie_word_embeddings=True, qkv_bias=True)):
        made = RandomWeights(config, recipe, device="cpu")
        assert weight_bytes(config, recipe, torch.float16) == sum(made[name].nbytes for name in made)


def test_rows_are_what_the_tensors_take(tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.csv", tmp_path / "plots" / "memory.svg"
    shape_of = ("shape=tiny", "device=cpu", "context=300")
    assert main(["bench", "memory", *shape_of, "batch=200,400", f"out={out}", f"plot={plot}"]) == 0
    found = rows.read(out)
    assert [(row["recipe"], row["batch"]) for row in found] == [
        ("fp16", "200"),
        ("fp16", "400"),
        ("fp16-kv8-channel", "200"),
        ("fp16-kv8-channel", "400"),
    ]
    kv8 = Recipe(kv="kv8", kv_granularity="channel")
    for row in found:
        pages = int(row["batch"]) * 5  # of 64 tokens
        scales = random_kv_scales(TINY, kv8 if row["recipe"] == "fp16-kv8-channel" else Recipe())
        cache = KVCache(TINY, num_pages=pages, page_len=64, device="cpu", dtype=torch.float16, scales=scales)
        taken = sum(layer.key.nbytes + layer.value.nbytes for layer in cache.layers)
        assert float(row["kv_mb"]) == pytest.approx(taken / 1e6, abs=0.06)
        assert float(row["weights_mb"]) == pytest.approx(weight_bytes(TINY, Recipe(), torch.float16) / 1e6, abs=0.06)
        assert float(row["total_mb"]) == pytest.approx(float(row["kv_mb"]) + float(row["weights_mb"]), abs=0.11)
        assert row["source"] == "computed"
    assert "fp16-kv8" in plot.read_text()


def test_a_plot_that_cannot_be_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", "shape=tiny", "device=cpu", "plot=memory.gif", "out=none"]) == 1
    assert "memory.gif is no plot: its name must end in .svg" in capsys.readouterr().err
    assert main(["bench", "memory", "shape=tiny", "device=cpu", "caches=kv4", "out=none"]) == 1
    assert "caches is 'kv4', but must be one of kv16, kv8" in capsys.readouterr().err
