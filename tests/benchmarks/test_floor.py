import pytest
import torch

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.floor import Cost, cost, generation_seconds, prefill_operations, step_seconds, throughput_seconds
from benchmarks.shapes import shape
from engine.config import Recipe

# The ceilings of an H200.
H200 = Ceilings(copy=4.28e12, matmul=790e12)
LLAMA2 = shape("llama2_7b")


@pytest.mark.parametrize(
    ("recipe", "weight_gb", "kv"),
    [
        (Recipe(), 13.21, 524288),
        (Recipe(weights="w8a8"), 6.74, 524288),
        (Recipe(weights="w4a16", group_size=128), 3.70, 524288),
        (Recipe(weights="w4a16", group_size=128, kv="kv8"), 3.70, 262144),
        (Recipe(weights="w4a16", group_size=128, head="int8"), 3.57, 524288),
        (Recipe(weights="w4a16", group_size=128, head="int4"), 3.51, 524288),
    ],
    ids=str,
)
def test_bytes_of_llama_2_7b(recipe: Recipe, weight_gb: float, kv: int) -> None:
    found = cost(LLAMA2, recipe, torch.float16)
    assert found.weight_bytes / 1e9 == pytest.approx(weight_gb, abs=0.006)
    assert found.kv_bytes == kv
    assert found.parameters == pytest.approx(6.607e9, rel=1e-3)


def test_the_floor_of_the_seeds_case() -> None:
    of = cost(shape("internlm7b"), Recipe(), torch.float16)
    seconds = generation_seconds(of, H200, batch=64, inputs=1, outputs=2048)
    assert 64 * 2048 / seconds == pytest.approx(5690, rel=0.003)


def test_a_step_is_bound_by_what_takes_longer() -> None:
    of = Cost(weight_bytes=100, parameters=50, kv_bytes=2)
    slow_copy, slow_product = Ceilings(copy=10, matmul=1e9), Ceilings(copy=1e9, matmul=10)
    assert step_seconds(of, slow_copy, tokens=3, context=5) == pytest.approx(11)
    assert step_seconds(of, slow_product, tokens=3, context=5) == pytest.approx(30)


def test_operations_of_a_prompt() -> None:
    """12.95 GFLOP a token of Llama-2-7B in the layers, the output matrix once, and attention over the causal half."""
    of = cost(LLAMA2, Recipe(), torch.float16)
    layers, head = 2 * 2048 * 6476005376, 2 * 32000 * 4096
    attention = 4 * (2048 * 2049 // 2) * 4096 * 32
    assert prefill_operations(LLAMA2, of, batch=3, inputs=2048) == 3 * (layers + head + attention)


def test_requests_that_fill_every_step_cost_what_their_steps_do() -> None:
    of = cost(LLAMA2, Recipe(), torch.float16)
    together = throughput_seconds(of, H200, [(1, 64)] * 8, at_once=8)
    stepwise = generation_seconds(of, H200, batch=8, inputs=1, outputs=64)
    assert together == pytest.approx(stepwise, rel=0.01)
    assert throughput_seconds(of, H200, [(1, 64)] * 16, at_once=8) == pytest.approx(2 * together)


def test_ceilings_are_measured() -> None:
    found = measure_ceilings("cpu", torch.float32)
    assert 1e8 < found.copy < 1e12
    assert 1e8 < found.matmul < 1e13
