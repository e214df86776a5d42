from dataclasses import replace

import pytest
import torch

from benchmarks.random_weights import RandomWeights, random_kv_scales
from benchmarks.shapes import SHAPES, shape
from engine.config import ModelConfig, Recipe
from engine.kernels.reference import unpack_int4
from engine.models import names
from engine.models.batch import packed
from engine.models.decoder import Decoder

FP16 = Recipe()
W4 = Recipe(weights="w4a16", group_size=64)
W4_HEAD8, W4_HEAD4 = (replace(W4, head=head) for head in ("int8", "int4"))
KV8 = Recipe(kv="kv8", kv_granularity="channel")
W8 = Recipe(weights="w8a8")
TINY = shape("tiny")
WITH_BIAS = replace(TINY, qkv_bias=True, tie_word_embeddings=True)


@pytest.mark.parametrize("config", [TINY, WITH_BIAS])
@pytest.mark.parametrize("recipe", [FP16, W8, W4, W4_HEAD8, W4_HEAD4], ids=str)
def test_logits_are_finite_and_of_order_one(config: ModelConfig, recipe: Recipe) -> None:
    weights = RandomWeights(config, recipe, device="cpu", seed=3)
    model = Decoder(config, weights, device="cpu", dtype=torch.float32)
    logits = model(packed([list(range(3, 60))]), None)
    assert logits.isfinite().all()
    assert 0.3 < float(logits.std()) < (30 if config.tie_word_embeddings and recipe.head == "fp16" else 3)
    assert any(weights[name].any() for name in weights if name.endswith("bias")) is config.qkv_bias


@pytest.mark.parametrize("recipe", [FP16, W8, W4], ids=str)
def test_a_linear_keeps_the_deviation_of_its_input(recipe: Recipe) -> None:
    weights = RandomWeights(TINY, recipe, device="cpu")
    module = names.layer_name(0, "mlp.up_proj")
    if recipe.weights == "fp16":
        dense = weights[f"{module}.weight"].float()
    elif recipe.weights == "w8a8":
        dense = weights[f"{module}.weight"].float() * weights[f"{module}.{names.WEIGHT_SCALE}"][:, None]
        assert int(weights[f"{module}.weight"].min()) == -127
    else:
        dense = unpack_int4(*(weights[f"{module}.{part}"] for part in names.QUANTIZED))
    assert tuple(dense.shape) == names.linear_shape(TINY, "mlp.up_proj")
    assert float(dense.std()) == pytest.approx(TINY.hidden_size**-0.5, rel=0.05)
    assert abs(float(dense.mean())) < 0.02 * float(dense.std()) + 0.01


def test_a_tensor_is_the_same_every_time_and_another_for_every_name_and_seed() -> None:
    weights = RandomWeights(TINY, FP16, device="cpu", seed=1)
    up, gate = (names.layer_name(0, f"mlp.{module}.weight") for module in ("up_proj", "gate_proj"))
    assert torch.equal(weights[up], weights[up])
    assert not torch.equal(weights[up], weights[gate])
    assert not torch.equal(weights[up], RandomWeights(TINY, FP16, device="cpu", seed=2)[up])


def test_the_mapping_has_every_tensor_of_the_model() -> None:
    weights = RandomWeights(TINY, FP16, device="cpu")
    assert {name: weights.shape(name) for name in weights} == names.model_tensors(TINY)
    assert {name: tuple(weights[name].shape) for name in weights} == names.model_tensors(TINY)
    assert names.HEAD not in RandomWeights(WITH_BIAS, FP16, device="cpu")


def test_a_head_that_does_not_go_with_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="head=int8 goes with w4a16 weights, not with fp16"):
        RandomWeights(TINY, replace(FP16, head="int8"), device="cpu")


def test_a_group_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size 96 does not divide the 128 inputs"):
        RandomWeights(TINY, replace(W4, group_size=96), device="cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_has_weights_and_kv_scales(name: str) -> None:
    config = shape(name)
    for recipe in (FP16, W8, replace(W4, group_size=128)):
        assert len(RandomWeights(config, recipe, device="cpu")) > 7 * config.num_layers
    assert random_kv_scales(config, KV8).key.shape == (config.num_layers, config.num_kv_heads, config.head_dim, 2)
