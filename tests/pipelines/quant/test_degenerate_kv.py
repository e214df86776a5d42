"""Int8 K and V at the edge, through the stages and the cache: dead heads, constant channels, data of one token."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import KVGranularity
from engine.models.batch import packed
from engine.models.cache import KVCache
from engine.storage.checkpoint import load_checkpoint
from engine.storage.workspace import Workspace, load_workspace
from tests.pipelines.quant.w4a16.test_degenerate import HIDDEN, a_build
from tests.pipelines.stage import FP16, W8A8

TOKENS = list(range(3, 40))
GRANULARITIES = get_args(KVGranularity)
KEYS, VALUES = "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def through_the_cache(folder, tokens=TOKENS):
    """Logits of a prompt whose K and V went through the artifact's int8 pages."""
    workspace, model = Workspace(folder), load_workspace(folder, device="cpu", dtype=torch.float32)
    scales = workspace.kv_scales()
    cache = KVCache(model.config, num_pages=1, page_len=64, device="cpu", dtype=torch.float32, scales=scales)
    slots, page = torch.arange(len(tokens)), torch.zeros(1, 1, dtype=torch.int32)
    return model(replace(packed([tokens]), slots=slots, page_table=page), cache)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_heads_without_weights_and_channels_that_never_move_are_kept_exactly(tmp_path, granularity):
    keys, values = torch.randn(2, 32, HIDDEN, generator=torch.Generator().manual_seed(2)) * HIDDEN**-0.5
    keys[:16] = 0.0  # a whole KV head of zeros
    values[16:] = 0.0  # the other one has a V that is its bias for every token
    bias = torch.zeros(32)
    bias[16:] = torch.linspace(-2, 2, 16)
    weights = {f"{KEYS}.weight": keys, f"{KEYS}.bias": torch.zeros(32)}
    weights |= {f"{VALUES}.weight": values, f"{VALUES}.bias": bias}
    build = a_build(tmp_path, replace=weights, attention_bias=True)
    folder = build.artifact(FP16, "kv8", granularity=granularity)
    seen = load_file(build.root / "calibrate/blocks.safetensors")["tokens"][0].tolist()
    wanted, found = load_checkpoint(tmp_path / "model")(packed([seen]), None), through_the_cache(folder, seen)
    assert bool(found.isfinite().all())
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("weights", [FP16, W8A8], ids=["fp16", "w8a8"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ranges_of_a_single_token_have_a_finite_result(tmp_path, granularity, weights):
    """Every channel's range is one value: whatever comes later is read as that, and by `token` as what it is."""
    build = a_build(tmp_path)
    calibrated = build.calibrate(samples=1, sequence_length=1)
    quantized = build.quantize(weights, calibrated)
    inputs = {"shard": build.shard(weights, quantized), "quantize": quantized, "calibrate": calibrated}
    found = through_the_cache(build.export(weights, "kv8", granularity=granularity, **inputs))
    wanted = load_checkpoint(tmp_path / "model")(packed([TOKENS]), None)
    assert bool(found.isfinite().all())
    assert (float((found - wanted).norm() / wanted.norm()) < 0.15) == (granularity == "token")


@pytest.mark.parametrize("granularity", [granularity for granularity in GRANULARITIES if granularity != "token"])
def test_ranges_that_are_not_finite_are_refused_and_nothing_is_left(tmp_path, granularity):
    build = a_build(tmp_path)
    calibrated = build.calibrate()
    quantized = build.quantize(FP16, calibrated)
    statistics = load_file(calibrated / "stats.safetensors")
    statistics["key/max/model.layers.1"][1, 3] = float("inf")
    save_file(statistics, calibrated / "stats.safetensors")
    inputs = {"shard": build.shard(FP16, quantized), "quantize": quantized, "calibrate": calibrated}
    before = sorted(build.root.iterdir())
    with pytest.raises(ValueError, match="not finite"):
        build.export(FP16, "kv8", granularity=granularity, **inputs)
    assert sorted(build.root.iterdir()) == before
