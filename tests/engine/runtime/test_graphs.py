"""Decode steps as graphs: the sizes here, and on a GPU the same answers as from a CPU's engine."""

import pytest
import torch

from engine.config import Sampling
from engine.runtime.graphs import batch_sizes
from tests.engine.runtime.test_engine import PROMPTS, make
from tests.engine.runtime.tiny_model import tiny_model


def test_sizes_end_with_the_largest_batch_and_padding_is_bounded():
    for most in (1, 3, 64, 100, 256, 300, 1000):
        sizes = batch_sizes(most)
        assert sizes[-1] == most
        assert sizes == sorted(set(sizes))
        for batch in range(33, most + 1):
            assert next(size for size in sizes if size >= batch) - batch < 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("depth", [0, 1])
def test_answers_are_those_of_a_cpu(depth):
    option = Sampling(temperature=0, max_new_tokens=12, ignore_eos=True)
    expected = make(tiny_model(device="cpu")).generate(PROMPTS, option)
    made = make(tiny_model())
    made._runner.depth = depth
    answers = made.generate(PROMPTS, option)
    made.check()
    assert [one.token_ids for one in answers] == [one.token_ids for one in expected]


def test_a_step_in_flight_is_landed_when_generate_is_broken_off(monkeypatch):
    made = make(tiny_model())
    made._runner.depth = 1
    launch, count = made._runner.launch, 0

    def failing(plan):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return launch(plan)

    monkeypatch.setattr(made._runner, "launch", failing)
    with pytest.raises(KeyboardInterrupt):
        made.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=9))
    assert not made.has_work()
    made.check()
    answers = made.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=9))
    assert [one.token_ids for one in answers] == [
        one.token_ids for one in make(tiny_model()).generate(PROMPTS, Sampling(temperature=0, max_new_tokens=9))
    ]


def test_end_ids_that_the_model_cannot_draw_are_none():
    made = make(tiny_model(), eos=(-1, 3, 10**6))
    assert made.eos_token_ids == (3,)
    answer = made.generate([PROMPTS[0]], Sampling(temperature=0, max_new_tokens=5, ignore_eos=True))[0]
    assert len(answer.token_ids) == 5
