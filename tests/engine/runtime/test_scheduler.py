"""The scheduler without a model. (Above 300 lines: one set of helpers serves every case.)"""

import random
import subprocess
import sys

import pytest

from engine.runtime.cache import PageTable
from engine.runtime.scheduler import Scheduler
from engine.runtime.sequence import PENDING, Sequence


def scheduler(num_pages=100, page_len=4, batch=4, budget=16, prefix_caching=True):
    return Scheduler(
        PageTable(num_pages, page_len), max_batch_size=batch, num_tokens_per_iter=budget, prefix_caching=prefix_caching
    )


def sequence(name, tokens, new=4, scored=False):
    tokens = list(range(tokens)) if isinstance(tokens, int) else tokens
    return Sequence(request_id=name, tokens=list(tokens), limit=len(tokens) + new, scored=scored)


def step(made, token=0):
    """One step whose new tokens are all `token`; returns {request: scheduled tokens}. Ended sequences are finished."""
    plan = made.schedule()
    made.check()
    scheduled = {sequence.request_id: sequence.scheduled for sequence in plan.sequences}
    made.commit(plan, [token for _ in plan.drawing])
    for sequence in plan.sequences:
        if len(sequence) == sequence.limit:
            made.finish(sequence)
    made.check()
    return scheduled


def test_the_scheduler_needs_no_torch():
    code = "import sys, engine.runtime.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_long_prompt_is_cut_into_chunks_and_then_decodes():
    made = scheduler(budget=6)
    made.add(sequence("a", 14, new=3))
    assert [step(made) for _ in range(5)] == [{"a": 6}, {"a": 6}, {"a": 2}, {"a": 1}, {"a": 1}]
    assert not made.has_work()
    assert made.pages.num_available == 100


def test_one_step_mixes_decode_and_prefill_and_arrival_decides():
    made = scheduler(budget=8)
    made.add(sequence("a", 3))
    assert step(made) == {"a": 3}
    made.add(sequence("b", 12))
    made.add(sequence("c", 3))
    assert step(made) == {"a": 1, "b": 7}
    assert step(made) == {"a": 1, "b": 5, "c": 2}
    assert step(made) == {"a": 1, "b": 1, "c": 1}


def test_the_longest_contexts_come_first_among_those_with_one_token():
    made = scheduler(budget=16)
    made.add(sequence("short", 2))
    made.add(sequence("long", 8))
    made.add(sequence("middle", 4))
    step(made)
    made.add(sequence("prompt", 12))
    assert list(step(made)) == ["long", "middle", "short", "prompt"]


def test_no_more_than_max_batch_size_run():
    made = scheduler(batch=2, budget=100)
    for name in "abc":
        made.add(sequence(name, 3, new=2))
    assert step(made) == {"a": 3, "b": 3}
    assert step(made) == {"a": 1, "b": 1}
    assert step(made) == {"c": 3}


def test_a_budget_below_the_batch_serves_the_first_comers():
    made = scheduler(budget=2)
    for name in "abc":
        made.add(sequence(name, 1, new=3))
    assert [step(made) for _ in range(4)] == [{"a": 1, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, {"c": 1}]


def test_a_prefix_is_found_and_at_least_one_token_is_computed():
    made = scheduler()
    made.add(sequence("a", 8, new=1))
    assert step(made) == {"a": 8}
    again, longer, other = sequence("b", 8, new=1), sequence("c", 9, new=1), sequence("d", [9, *range(1, 8)], new=1)
    for item in (again, longer, other):
        made.add(item)
    assert step(made) == {"b": 4, "c": 1, "d": 8}
    assert (again.prefix_hit, longer.prefix_hit, other.prefix_hit) == (4, 8, 0)


def test_pages_are_found_only_after_the_step_that_writes_them():
    made = scheduler(budget=100)
    made.add(sequence("a", 8))
    made.add(sequence("b", 8))
    assert step(made) == {"a": 8, "b": 8}, "in the same step nothing is written yet"
    made.add(sequence("c", 8))
    assert step(made)["c"] == 4


def test_generated_tokens_are_found_by_the_next_turn():
    made = scheduler()
    made.add(sequence("a", 6, new=4))
    while made.has_work():
        step(made, token=42)
    made.add(sequence("b", [*range(6), 42, 42, 42, 42, 7], new=1))
    assert step(made) == {"b": 3}


def test_without_prefix_caching_and_for_scored_sequences_nothing_is_shared():
    made = scheduler(prefix_caching=False)
    for _ in range(2):
        made.add(sequence("a", 8, new=1))
        assert step(made) == {"a": 8}
    made = scheduler()
    made.add(sequence("a", 8, new=0, scored=True))
    assert step(made) == {"a": 8}
    made.add(sequence("b", 8, new=1))
    assert step(made) == {"b": 8}, "a scored sequence publishes nothing"
    made.add(sequence("c", 8, new=0, scored=True))
    assert step(made) == {"c": 8}, "and finds nothing"


def test_the_latest_arrival_is_preempted_and_comes_back_to_the_same_tokens():
    made = scheduler(num_pages=5, page_len=2)
    first, second = sequence("a", [1, 2, 3], new=7), sequence("b", [4, 5], new=6)
    made.add(first)
    made.add(second)
    seen = []
    while made.has_work():
        seen.append(step(made, token=9))
    assert made.num_preemptions > 0
    assert first.tokens == [1, 2, 3] + [9] * 7
    assert second.tokens == [4, 5] + [9] * 6
    alone = next(i for i, scheduled in enumerate(seen) if "b" not in scheduled)
    assert all("a" in scheduled for scheduled in seen[:alone]), "the first comer never waits"
    assert made.pages.num_available == 5


def test_a_sequence_is_admitted_only_with_room_for_the_others_to_grow():
    made = scheduler(num_pages=4, page_len=2)
    made.add(sequence("a", 4, new=3))
    made.add(sequence("b", [8, 9, 9, 9], new=1))
    assert step(made) == {"a": 4}, "two pages are free, but the first comer is about to need one of them"
    assert [step(made), step(made)] == [{"a": 1}, {"a": 1}]
    assert step(made) == {"b": 4}
    assert made.num_preemptions == 0


def test_a_preempted_sequence_finds_its_own_pages_again():
    made = scheduler(num_pages=8, page_len=2)
    item = sequence("a", 8, new=4)
    made.add(item)
    step(made)
    made._preempt(item)
    made.check()
    assert (item.cached, item.pages) == (0, [])
    assert step(made) == {"a": 1}
    assert item.prefix_hit == 0, "only the first admission tells what the cache saved"


def test_a_step_that_failed_can_be_scheduled_anew():
    made = scheduler(budget=6)
    item = sequence("a", 8)
    made.add(item)
    for _ in range(3):
        plan = made.schedule()
        made.check()
        assert item.scheduled == 6
    made.commit(plan, [])
    assert item.cached == 6


def test_finish_frees_running_and_waiting_sequences_at_once():
    made = scheduler(batch=1)
    first, second = sequence("a", 8), sequence("b", 8)
    made.add(first)
    made.add(second)
    made.schedule()
    made.finish(second)
    made.finish(first)
    made.check()
    assert not made.has_work()
    assert made.pages.num_available == 100


def test_what_it_says_of_itself():
    made = scheduler(num_pages=10, batch=2)
    for name in "abc":
        made.add(sequence(name, 4))
    step(made)
    assert made.figures() == {"running": 2, "waiting": 1, "cache_usage": pytest.approx(0.2), "preemptions": 0}


def test_what_can_never_fit_is_refused():
    made = scheduler(num_pages=2, page_len=4)
    made.add(sequence("a", 4, new=4))
    with pytest.raises(ValueError, match=r"9 tokens.*2 pages of 4 tokens"):
        made.add(sequence("b", 4, new=5))
    for options in ({"batch": 0}, {"budget": 0}):
        with pytest.raises(ValueError, match=r"max_batch_size|num_tokens_per_iter"):
            scheduler(**options)


def test_prompts_wait_for_each_other_while_many_decode():
    made = scheduler(batch=8, budget=100)
    made._prefill_interval = 3
    for name in "abc":
        made.add(sequence(name, 3, new=20))
    assert step(made) == {"a": 3, "b": 3, "c": 3}, "nothing runs yet"
    made.add(sequence("d", 5, new=20))
    assert step(made) == {"a": 1, "b": 1, "c": 1}
    made.add(sequence("e", 5, new=20))
    assert step(made) == {"a": 1, "b": 1, "c": 1}
    assert step(made) == {"a": 1, "b": 1, "c": 1, "d": 5, "e": 5}
    made.finish(made.running[0])
    made.finish(made.running[0])
    made.finish(made.running[0])
    made.add(sequence("f", 2, new=20))
    assert step(made) == {"d": 1, "e": 1, "f": 2}, "a quarter of the batch or less runs"


def test_a_step_is_scheduled_while_the_last_is_computed():
    made = scheduler(budget=10)
    first, second = sequence("a", 3, new=3), sequence("b", [7, 7], new=1)
    made.add(first)
    made.add(second)
    drawn = made.advance(made.schedule())
    assert drawn == [first, second]
    assert (first.tokens, first.known, first.cached) == ([0, 1, 2, PENDING], 3, 3)
    after = made.schedule()
    assert after.sequences == (first,), "the last token of the other is being drawn"
    later = made.advance(after)
    assert first.tokens == [0, 1, 2, PENDING, PENDING]
    assert made.resolve(drawn, [5, 6]) == [first, second]
    assert (first.tokens, second.tokens) == ([0, 1, 2, 5, PENDING], [7, 7, 6])
    made.finish(first)
    made.finish(second)
    assert made.resolve(later, [9]) == [], "what an ended sequence drew means nothing"
    made.check()
    assert made.pages.num_available == 100


def test_a_page_is_published_when_its_last_token_is_known():
    made = scheduler(budget=20)
    made.add(sequence("a", 7, new=9))
    drawn = made.advance(made.schedule())
    later = made.advance(made.schedule())  # writes the eighth token, which is being drawn
    assert made.pages.lookup(made._digests(made.running[0])) == made.running[0].pages[:1]
    made.resolve(drawn, [42])
    made.resolve(later, [43])
    item = sequence("b", [*range(7), 42, 1], new=1)
    made.add(item)
    assert {one.request_id: one.scheduled for one in made.schedule().sequences} == {"a": 1, "b": 1}


def test_a_preempted_sequence_waits_for_its_token():
    made = scheduler(num_pages=8, page_len=2)
    item = sequence("a", 4, new=4)
    made.add(item)
    drawn = made.advance(made.schedule())
    made._preempt(item)
    assert not made.schedule().sequences
    made.resolve(drawn, [9])
    assert made.schedule().sequences == (item,)
    assert item.tokens == [0, 1, 2, 3, 9]


def random_operations(seed, count, late=False):
    """Sequences come, run, end and are aborted at random; what a token is depends on the tokens before it alone."""
    rng = random.Random(seed)
    page_len, num_pages = rng.choice([1, 2, 4]), rng.randint(4, 20)
    budget = rng.choice([1, 3, 7, 50])
    made = scheduler(num_pages, page_len, batch=rng.randint(1, 5), budget=budget, prefix_caching=rng.random() < 0.7)
    most = num_pages * page_len
    alive, finished = [], 0
    flying = []
    for number in range(count):
        action = rng.random()
        if action < 0.25 and len(alive) < 8:
            tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, max(1, most // 2)))]
            new = rng.randint(1, max(1, min(8, most - len(tokens))))
            alive.append(sequence(str(number), tokens, new, scored=False))
            made.add(alive[-1])
        elif action < 0.3 and alive:
            made.finish(alive.pop(rng.randrange(len(alive))))
        else:
            plan = made.schedule()
            made.check()
            assert bool(plan.sequences) == made.has_work() or flying, "work without progress"
            assert sum(item.scheduled for item in plan.sequences) <= budget
            flying.append(made.advance(plan))
            while flying and (len(flying) > late or not plan.sequences):
                drawing = flying.pop(0)
                tokens = [sum(item.tokens[: item.known]) % 2 for item in drawing]
                for item in made.resolve(drawing, tokens):
                    if item.known == item.limit:
                        made.finish(item)
                        alive.remove(item)
                        finished += 1
        made.check()
        order = [int(item.request_id) for item in (*made.running, *made.waiting)]
        assert order == sorted(order), "an order other than that of arrival"
    for drawing in flying:
        for item in made.resolve(drawing, [0] * len(drawing)):
            if item.known == item.limit:
                made.finish(item)
    while made.has_work():
        step(made)
    assert made.pages.num_available == num_pages
    return finished, made.num_preemptions


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a step late"])
def test_random_operations(late):
    finished, preemptions = map(sum, zip(*(random_operations(seed, 150, late) for seed in range(60)), strict=True))
    assert finished > 500
    assert preemptions > 50


@pytest.mark.soak
def test_random_operations_soak(soak_row):
    for seed in range(1000):
        random_operations(seed, 500, late=bool(seed % 2))
        soak_row["count"] += 500
