"""Steps as graphs: the sizes here, and the same answers as without, padded as graphs are here and by them on a GPU."""

import pytest
import torch

from engine.config import Sampling
from engine.kernels import ops
from engine.models.cache import KVCache
from engine.runtime.batch import Size, Step
from engine.runtime.channel import HEADER, pack, unpack
from engine.runtime.decode_steps import batch_sizes
from engine.runtime.engine import Engine
from engine.runtime.graphs import Graphs, graph_sizes
from tests.engine.runtime.test_engine import PROMPTS, WAYS, make
from tests.engine.runtime.tiny_model import DEVICE, tiny_model


def test_sizes_end_with_the_largest_batch_and_padding_is_bounded():
    for most in (1, 3, 64, 100, 256, 300, 1000):
        sizes = batch_sizes(most)
        assert sizes[-1] == most
        assert sizes == sorted(set(sizes))
        for batch in range(33, most + 1):
            assert next(size for size in sizes if size >= batch) - batch < 64


def test_graphs_for_unequal_contexts_are_counted_and_the_same_in_all_ranks(monkeypatch):
    class Ranks:
        def least(self, number, device):
            return min(number, asked[-1] < 8)  # the other rank's table has no row for so many

    def minds(pages, heads, sequences):
        asked.append(sequences)
        return sequences > 2

    asked = []
    monkeypatch.setattr(ops, "minds_lengths", minds)
    model = tiny_model()
    cache = KVCache(model.config, num_pages=2, page_len=4, device=DEVICE, dtype=model.dtype)

    def sizes():
        return graph_sizes(model, cache, max_batch_size=8, num_tokens_per_iter=16)

    assert sizes().uneven == [4, 8] and sizes().number == 4 + len(sizes().mixed) + 2
    assert sizes().largest.uneven == [8]
    monkeypatch.setattr(model, "ranks", Ranks())
    assert sizes().uneven == [4] and sizes().largest.uneven == []
    monkeypatch.setattr(model, "deterministic", True)
    assert sizes() == ([1, 2, 4, 8], [], [])


def padded(engine: Engine, *, budget: int = 512) -> Engine:
    """An engine whose steps are padded as those of graphs, which on a GPU it has already."""
    runner = engine._runner
    runner.depth = 1
    if DEVICE == "cpu":
        model, cache, most = runner._model, runner._cache, engine._scheduler._max_batch_size
        runner._cache = KVCache(
            model.config, num_pages=cache.num_pages + 1, page_len=cache.page_len, device=DEVICE, dtype=model.dtype
        )
        runner._graphs = Graphs(
            model,
            runner._cache,
            runner._drawn,
            eos_token_ids=engine.eos_token_ids,
            max_batch_size=most,
            session_len=engine.session_len,
            sizes=graph_sizes(model, runner._cache, max_batch_size=most, num_tokens_per_iter=budget),
            captured=False,
        )
    return engine


def unpadded(engine: Engine) -> Engine:
    engine._runner.release()
    return engine


def count_steps(engine, monkeypatch):
    """The graphs that an engine uses from now on, None for a step without one."""
    graphs, seen = engine._runner._graphs, []

    def step_of(*arguments):
        step = given(*arguments)
        seen.append(step and step.graph)
        return step

    given = graphs.step_of
    monkeypatch.setattr(graphs, "step_of", step_of)
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_answers_are_the_same_with_graphs(way, temperature, monkeypatch):
    model, options = tiny_model(), {"session_len": 24, **WAYS[way]}
    samplings = [
        Sampling(temperature=temperature * (number % 2), seed=number, max_new_tokens=8, ignore_eos=number > 1)
        for number in range(len(PROMPTS))
    ]
    plain = unpadded(make(model, eos=(5,), **options))
    made = padded(make(model, eos=(5,), **options), budget=options.get("num_tokens_per_iter", 512))
    seen = count_steps(made, monkeypatch)
    for _ in range(2):  # the second round starts from prefix hits
        expected, answers = (engine.generate(PROMPTS, samplings) for engine in (plain, made))
        assert [one.token_ids for one in answers] == [one.token_ids for one in expected]
        made.check()
    assert None not in seen and {size.room > 0 for size in seen} == {False, True}
    assert (made._scheduler.num_preemptions > 0) == way.startswith("preempted")


def test_contexts_of_unequal_lengths_have_graphs_of_their_own(monkeypatch):
    monkeypatch.setattr(ops, "minds_lengths", lambda pages, heads, sequences: sequences > 2)
    made, plain = padded(make(tiny_model())), unpadded(make(tiny_model()))
    option = Sampling(temperature=0, max_new_tokens=4, ignore_eos=True)
    for lengths, expected in (([8] * 4, {Size(4)}), ([20, 4, 4, 4], {Size(4, uneven=True)}), ([20, 4], {Size(2)})):
        seen = count_steps(made, monkeypatch)
        prompts = [[(row * 7 + place) % 60 for place in range(length)] for row, length in enumerate(lengths)]
        answers = made.generate(prompts, option)
        assert {size for size in seen if not size.room} == expected
        assert [one.token_ids for one in answers] == [one.token_ids for one in plain.generate(prompts, option)]


def test_another_rank_computes_the_same_from_what_it_is_told(monkeypatch):
    one, other = padded(make(tiny_model())), padded(make(tiny_model()))
    told = []
    monkeypatch.setattr(one._runner, "_tell", lambda step: told.append(pack(step.message())[HEADER:]))
    one.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=8))
    steps = [Step.of_message(unpack(message)) for message in told]
    assert {step.graph.room > 0 for step in steps} == {False, True}
    tables = {(step.graph.room > 0, step.lengths[1] > 0) for step in steps}
    assert tables == {(True, True), (False, True), (False, False)}, "what has not changed is not sent"
    for step in steps:
        other._runner.follow(step)
        other._runner._drawn.tolist()  # waits, as rank 0 does before it goes on
    for ours, theirs in zip(other._runner._cache.layers, one._runner._cache.layers, strict=True):
        assert torch.equal(ours.key[:-1], theirs.key[:-1]) and torch.equal(ours.value[:-1], theirs.value[:-1])
        assert ours.key.any()


def test_what_fits_no_graph_is_computed_without(monkeypatch):
    made = padded(make(tiny_model()))
    seen = count_steps(made, monkeypatch)
    scores = []
    made.score(PROMPTS[:2], lambda item, start, logits: scores.append(logits.cpu()))
    assert not seen, "scored sequences need the logits of all tokens"
    long = [number % 60 for number in range(39)]
    monkeypatch.setattr(made._runner._graphs._mixed, "sizes", [Size(16, 4)])
    option = Sampling(temperature=0, max_new_tokens=1)
    answer = made.generate([long], option)[0]
    assert seen == [None]
    assert answer.token_ids == unpadded(make(tiny_model())).generate([long], option)[0].token_ids


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
