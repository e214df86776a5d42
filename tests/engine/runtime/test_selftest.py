import dataclasses
import math

import pytest
import torch

from engine.config import EngineConfig
from engine.models import names
from engine.models.cache import KVScales
from engine.models.decoder import Decoder
from engine.runtime.engine import Engine
from engine.runtime.selftest import (
    FLOAT_TOLERANCE,
    NUM_SIGNS,
    deviation,
    locate_difference,
    record,
    replay,
    sketch,
    trace,
)
from tests.engine.runtime.tiny_model import CONFIG, CharTokenizer, tiny_model

PROMPTS = {"first": [3, 1, 4, 1, 5, 9, 2, 6], "second": [2, 7, 1, 8]}
SCALES = KVScales.of_heads(
    key=torch.tensor([0.05, 0.0]).repeat(CONFIG.num_layers, CONFIG.num_kv_heads, 1),
    value=torch.tensor([0.05, 0.0]).repeat(CONFIG.num_layers, CONFIG.num_kv_heads, 1),
    head_dim=CONFIG.head_dim,
)


def _engine(model: Decoder, scales: KVScales | None = None) -> Engine:
    return Engine(model, CharTokenizer(), EngineConfig(), session_len=64, kv_scales=scales)


def _record(model: Decoder, scales: KVScales | None = None) -> list[dict]:
    return record(_engine(model, scales), model, scales, PROMPTS, num_tokens=6)


@pytest.mark.parametrize("scales", [None, SCALES])
def test_the_same_engine_passes(scales: KVScales | None) -> None:
    model = tiny_model()
    goldens = _record(model, scales)
    assert [len(golden["answer_ids"]) for golden in goldens] == [6, 6]
    assert replay(_engine(tiny_model(), scales), goldens, tolerance=1e-6, exact=True) == []
    assert all(locate_difference(model, scales, golden, tolerance=1e-6) is None for golden in goldens)


def test_the_trace_goes_through_the_cache_of_the_engine() -> None:
    model = tiny_model()
    plain, bytes_ = (trace(model, PROMPTS["first"], scales) for scales in (None, SCALES))
    first = "model.layers.0.self_attn.o_proj"
    assert plain["model.layers.0.self_attn.k"] == bytes_["model.layers.0.self_attn.k"]
    assert deviation(plain[first], bytes_[first]) > 1e-4
    assert deviation(plain["lm_head"], _record(model)[0]["logits"]) < 1e-5


def test_another_engine_fails_in_logits_and_answers_and_tolerance_alone_judges_logits() -> None:
    goldens = _record(tiny_model())
    other = _engine(tiny_model(dataclasses.replace(CONFIG, rope_theta=77.0)))
    found = replay(other, goldens, tolerance=FLOAT_TOLERANCE, exact=True)
    assert any("logits after 'first' deviates by" in message for message in found)
    elsewhere = replay(other, goldens, tolerance=math.inf, exact=False)
    assert elsewhere == []
    goldens[1]["answer_ids"] = [*goldens[1]["answer_ids"][:-1], 0, 0]
    found = replay(_engine(tiny_model()), goldens, tolerance=1e-6, exact=True)
    assert len(found) == 1
    assert "greedy answer to 'second'" in found[0]


def test_a_wrong_rope_base_is_located() -> None:
    goldens = _record(tiny_model())
    found = locate_difference(
        tiny_model(dataclasses.replace(CONFIG, rope_theta=9000.0)), None, goldens[0], tolerance=1e-3
    )
    assert found is not None
    assert found.startswith("model.layers.0.self_attn.k deviates by")
    assert "rope_theta" in found


@pytest.mark.parametrize(
    ("module", "where"),
    [
        ("self_attn.v_proj", "model.layers.1.self_attn.v deviates"),
        ("self_attn.q_proj", "the input of model.layers.1.self_attn.o_proj deviates"),
        ("self_attn.o_proj", "the input of model.layers.1.mlp.gate_proj deviates"),
        ("mlp.up_proj", "the input of model.layers.1.mlp.down_proj deviates"),
        ("mlp.down_proj", "lm_head deviates"),
    ],
)
def test_a_wrong_weight_is_located(monkeypatch: pytest.MonkeyPatch, module: str, where: str) -> None:
    goldens = _record(tiny_model())
    made = Decoder.__init__

    def damaged(self, config, weights, **options) -> None:
        name = names.layer_name(1, f"{module}.weight")
        made(self, config, {**weights, name: weights[name] * 1.05}, **options)

    monkeypatch.setattr(Decoder, "__init__", damaged)
    found = locate_difference(tiny_model(), None, goldens[0], tolerance=1e-3)
    assert found is not None
    assert found.startswith(where)
    assert module in found


def test_swapped_gate_and_up_are_located(monkeypatch: pytest.MonkeyPatch) -> None:
    goldens = _record(tiny_model())
    monkeypatch.setattr(names, "GATE_UP", names.GATE_UP[::-1])
    found = locate_difference(tiny_model(), None, goldens[0], tolerance=1e-3)
    assert found is not None
    assert "the input of model.layers.0.mlp.down_proj deviates" in found
    assert "mlp.gate_proj or mlp.up_proj (model.layers.0)" in found


def test_a_smaller_model_has_not_the_recorded_tensor() -> None:
    goldens = _record(tiny_model())
    found = locate_difference(tiny_model(dataclasses.replace(CONFIG, num_layers=1)), None, goldens[0], tolerance=1.0)
    assert found is not None
    assert "model.layers.1.self_attn.q_proj was recorded" in found


@pytest.mark.parametrize("shape", [(512,), (40, 64), (4, 6, 8)])
def test_a_sketch_tells_a_deviation_in_parts_of_the_tensors_size(shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(2)
    values = torch.randn(shape, generator=source) * 7
    noise = torch.randn(shape, generator=source) * 7
    first = sketch(values)
    assert len(first) == 1 + NUM_SIGNS
    assert first[0] == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
    assert deviation(first, sketch(values)) == 0.0
    for share in (1e-3, 1e-1):
        # The largest of 16 normal numbers is within 0.8 and 4 standard deviations but for one case in a million.
        assert 0.8 * share < deviation(first, sketch(values + share * noise)) < 4 * share


def test_what_is_not_finite_deviates() -> None:
    values = torch.ones(8)
    broken = values.clone()
    broken[3] = math.nan
    assert deviation(sketch(values), sketch(broken)) > 1e30
    assert deviation(sketch(torch.zeros(8)), sketch(values)) == math.inf
    assert deviation(sketch(torch.zeros(8)), sketch(torch.zeros(8))) == 0.0
