from dataclasses import fields

import pytest
import torch

from engine.config import Sampling
from engine.kernels import ops
from engine.models.cache import KVCache
from engine.runtime.batch import Step, batch_of, build_batch, step_of
from engine.runtime.cache import PageTable
from engine.runtime.channel import HEADER, pack, unpack
from engine.runtime.runner import Runner
from engine.runtime.scheduler import Plan, Scheduler
from engine.runtime.sequence import PENDING, Sequence
from tests.engine.runtime.tiny_model import greedy, tiny_model, whole_logits

ANGLES = (torch.arange(5), torch.ones(1), 1.0)
PROMPT = [11, 3, 45, 8, 8, 20, 61, 5, 17, 33, 2]
OTHER = [9, 9, 1, 30]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def runner_of(model, *, num_pages=30, page_len=4, batch=8, budget=64):
    pages = PageTable(num_pages, page_len)
    cache = KVCache(model.config, num_pages=num_pages, page_len=page_len, device=model.device, dtype=torch.float32)
    runner = Runner(model, cache, eos_token_ids=(), graphs=False)
    return runner, Scheduler(pages, max_batch_size=batch, num_tokens_per_iter=budget)


def sequence(tokens, new=6):
    return Sequence(request_id="x", tokens=list(tokens), limit=len(tokens) + new, sampling=Sampling(temperature=0))


def test_a_plan_becomes_a_batch():
    first = Sequence(request_id="a", tokens=[5, 6, 7, 8, 9], limit=9, pages=[4, 2], cached=3, scheduled=2)
    chunk = Sequence(request_id="b", tokens=[1, 2, 3, 4], limit=9, pages=[0], cached=0, scheduled=2)
    scored = Sequence(request_id="c", tokens=[7, 7], limit=2, pages=[3], cached=0, scheduled=2, scored=True)
    batch = build_batch(Plan((first, chunk, scored)), page_len=4, device=torch.device("cpu"))
    assert batch.token_ids.tolist() == [8, 9, 1, 2, 7, 7]
    assert batch.positions.tolist() == [3, 4, 0, 1, 0, 1]
    assert batch.query_starts.tolist() == [0, 2, 4, 6]
    assert batch.context_lens.tolist() == [5, 2, 2]
    assert batch.page_table.tolist() == [[4, 2], [0, 0], [3, 0]]
    assert batch.slots.tolist() == [19, 8, 0, 1, 12, 13]
    assert batch.logits_at.tolist() == [1, 4, 5]
    for name in ("token_ids", "positions", "slots", "logits_at", "query_starts", "context_lens", "page_table"):
        assert getattr(batch, name).dtype == torch.int32, name


def test_a_step_crosses_to_other_ranks_as_it_is():
    running = Sequence(request_id="a", tokens=[5, 6, PENDING], limit=9, pages=[4, 2], cached=2, scheduled=1, pending=1)
    prompt = Sequence(request_id="b", tokens=[1, 2, 3, 4], limit=9, pages=[0], cached=0, scheduled=4, rope_base=2.5)
    before = Sequence(request_id="c", tokens=[1], limit=2)
    step = step_of(Plan((running, prompt)), page_len=4, rows={before: 0, running: 1})
    crossed = Step.of_message(unpack(pack(step.message())[HEADER:]))
    assert (crossed.draws, crossed.bases, crossed.decodes, crossed.width) == (2, [2.5], 1, 2)
    drawn = torch.tensor([8, 7])
    batches = [batch_of(each, device=torch.device("cpu"), drawn=drawn) for each in (step, crossed)]
    assert batches[0].token_ids.tolist() == [-2, 1, 2, 3, 4]
    embedding = torch.arange(10.0)[:, None]
    hidden, _, _ = ops.begin_step(*(getattr(batches[0], name) for name in ("token_ids", "drawn")), embedding, *ANGLES)
    assert hidden[:, 0].tolist() == [7, 1, 2, 3, 4]
    for name in (field.name for field in fields(batches[0])):
        one, other = (getattr(batch, name) for batch in batches)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


def decode(runner, scheduler, item):
    """Runs until `item` is whole; returns the logits from which each of its tokens was drawn."""
    seen = []
    while len(item) < item.limit:
        plan = scheduler.schedule()
        logits = runner.logits(plan)
        drawing = plan.drawing
        if item in drawing:
            seen.append(logits[drawing.index(item)].cpu())
        scheduler.commit(plan, logits.argmax(-1).tolist())
        for done in [one for one in plan.sequences if len(one) == one.limit]:
            scheduler.finish(done)
    return torch.stack(seen)


@pytest.mark.parametrize("way", ["whole", "chunked", "batched", "prefix hit", "preempted"])
def test_logits_are_those_of_the_whole_sequence_without_a_cache(model, way):
    budget = 3 if way == "chunked" else 64
    runner, scheduler = runner_of(model, budget=budget, num_pages=6 if way == "preempted" else 30)
    item = sequence(PROMPT)
    if way == "prefix hit":
        earlier = sequence(PROMPT[:9], new=1)
        scheduler.add(earlier)
        decode(runner, scheduler, earlier)
    if way in ("batched", "preempted"):
        scheduler.add(sequence(OTHER, new=9))
    scheduler.add(item)
    if way == "batched":
        scheduler.add(sequence(PROMPT[3:], new=2))
    logits = decode(runner, scheduler, item)
    assert item.prefix_hit == (8 if way == "prefix hit" else 0)
    assert (scheduler.num_preemptions > 0) == (way == "preempted")
    assert item.tokens[len(PROMPT) :] == greedy(model, PROMPT, 6)
    expected = whole_logits(model, item.tokens)[len(PROMPT) - 1 : -1]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_wrong_page_shows(model):
    runner, scheduler = runner_of(model)
    item = sequence(PROMPT, new=2)
    scheduler.add(item)
    plan = scheduler.schedule()
    scheduler.commit(plan, runner.run(plan).token_ids)
    item.pages[0] = next(page for page in range(30) if page not in item.pages)
    expected = whole_logits(model, item.tokens)[-1]
    assert (runner.logits(scheduler.schedule())[0].cpu() - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_step_that_only_fills_the_cache_draws_nothing(model):
    runner, scheduler = runner_of(model, budget=4)
    scheduler.add(sequence(PROMPT))
    assert runner.run(scheduler.schedule()) == ([], [])
