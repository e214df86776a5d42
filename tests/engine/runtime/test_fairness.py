import random
from collections import Counter

import pytest

from engine.runtime.cache import PageTable
from engine.runtime.fairness import ShortSteps, WaitingLine, prompt_limits, unfair
from engine.runtime.scheduler import Scheduler
from engine.runtime.sequence import Sequence


def sequence(name, owner, *, prompt=8, new=8, priority=0, start=0):
    tokens = [start * 1000 + number for number in range(prompt)]
    return Sequence(request_id=name, tokens=tokens, limit=prompt + new, owner=owner, priority=priority)


def test_among_one_owners_the_lowest_priority_then_the_first_to_come():
    line = WaitingLine()
    made = [sequence(name, "a", priority=priority) for name, priority in (("w", 0), ("x", 5), ("y", -1), ("z", 0))]
    for each in made:
        line.add(each)
    served = []
    while line:
        served.append(line.first([]))
        line.remove(served[-1])
    assert [each.request_id for each in served] == ["y", "w", "z", "x"]


def test_the_owner_with_the_fewest_running_comes_first():
    line = WaitingLine()
    for each in (sequence("1", "a"), sequence("2", "b", priority=9), sequence("3", "c")):
        line.add(each)
    assert line.first([]).owner == "a"
    assert line.first([sequence("0", "a")]).owner == "b"
    assert line.first([sequence("0", "a"), sequence("0", "b")]).owner == "c"
    assert len(line) == len(list(line)) == 3


def test_among_equals_the_one_whose_turn_is_longest_ago():
    line = WaitingLine()
    for number in range(3):
        line.add(sequence(str(number), "a"))
    line.add(sequence("late", "b"))
    served = []
    while line:
        served.append(line.first([]))
        line.admit(served[-1])
    assert [each.owner for each in served] == ["a", "b", "a", "a"]


def test_a_preempted_sequence_keeps_its_place():
    line = WaitingLine()
    first, second = sequence("1", "a"), sequence("2", "a")
    line.add(first)
    line.remove(first)
    line.add(second)
    line.add(first)
    assert line.first([]) is first


def test_who_gives_way():
    running = [sequence(str(number), owner) for number, owner in enumerate("aabac")]
    assert unfair(running, "d") is running[3]
    assert unfair(running, "b") is running[3]
    assert unfair(running, "a") is None
    assert unfair(running[1:], "b") is None
    assert unfair([], "b") is None


@pytest.mark.parametrize(
    ("needs", "budget", "limits"),
    [
        ({}, 8, {}),
        ({"a": 100}, 8, {"a": 8}),
        ({"a": 100, "b": 100}, 8, {"a": 4, "b": 4}),
        ({"a": 100, "b": 1}, 8, {"a": 7, "b": 4}),
        ({"a": 100, "b": 100, "c": 100}, 2, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_prompts_share_a_step(needs, budget, limits):
    assert prompt_limits(needs, budget) == limits


def steps_to_first_token(made, wanted):
    for count in range(1, 10_000):
        plan = made.schedule()
        made.check()
        drawing = plan.drawing
        made.commit(plan, [7] * len(drawing))
        for each in plan.sequences:
            if len(each) == each.limit:
                made.finish(each)
        made.check()
        if wanted in drawing:
            return count
    raise AssertionError("never")


@pytest.mark.parametrize("prompt", [8, 100, 300], ids=["short prompts", "prompts of several steps", "long prompts"])
@pytest.mark.parametrize("pages", [2000, 300], ids=["roomy", "tight"])
@pytest.mark.parametrize("warm", [0, 3, 40])
def test_two_hundred_waiting_of_one_key_do_not_hold_up_another(prompt, pages, warm):
    """Its first token comes within twice as many steps as on an idle engine, and one for the batch that is full."""

    def engine():
        return Scheduler(PageTable(pages, 4), max_batch_size=8, num_tokens_per_iter=64)

    alone = engine()
    mine = sequence("b", "b", prompt=prompt, start=999)
    alone.add(mine)
    idle = steps_to_first_token(alone, mine)
    busy = engine()
    for number in range(200):
        busy.add(sequence(str(number), "a", prompt=prompt, new=150, start=number))
    for _ in range(warm):
        plan = busy.schedule()
        busy.commit(plan, [7] * len(plan.drawing))
    mine = sequence("b", "b", prompt=prompt, start=999)
    busy.add(mine)
    assert steps_to_first_token(busy, mine) <= 2 * idle + 1


def test_all_owners_come_to_an_end_and_share_equally_on_the_way():
    made = Scheduler(PageTable(400, 4), max_batch_size=6, num_tokens_per_iter=32)
    generator = random.Random(3)
    left = []
    for number in range(60):
        left.append(sequence(str(number), generator.choice("aaaab"), new=generator.randint(4, 30), start=number))
        made.add(left[-1])
    shared = 0
    while made.has_work():
        plan = made.schedule()
        made.check()
        owners = [each.owner for each in made.running]
        waiting = {each.owner for each in made.waiting}
        if waiting == {"a", "b"} and len(owners) == 6:
            assert owners.count("a") == owners.count("b") == 3
            shared += 1
        made.commit(plan, [7] * len(plan.drawing))
        for each in plan.sequences:
            if len(each) == each.limit:
                made.finish(each)
                left.remove(each)
    assert not left
    assert shared > 10
    assert made.pages.num_available == 400


def scheduled(made):
    plan = made.schedule()
    made.check()
    made.commit(plan, [7] * len(plan.drawing))
    return {each.request_id: each.scheduled or 1 for each in plan.sequences}


def test_a_newcomer_has_a_step_of_its_own_and_the_next_is_for_all():
    made = Scheduler(PageTable(400, 4), max_batch_size=4, num_tokens_per_iter=32, prefill_interval=8)
    for number in range(6):
        made.add(sequence(f"a{number}", "a", new=50, start=number))
    assert set(scheduled(made)) == {"a0", "a1", "a2", "a3"}
    made.add(sequence("b0", "b", new=50, start=7))
    made.add(sequence("b1", "b", new=50, start=8))
    made.add(sequence("c0", "c", new=50, start=9))
    assert set(scheduled(made)) == {"b0", "c0"}, "one of each, at once, whatever prefill_interval says"
    made.add(sequence("d0", "d", new=50, start=10))
    assert set(scheduled(made)) == {"a0", "a1", "b0", "c0"}, "newcomers do not hold up the others twice in a row"
    assert set(scheduled(made)) == {"d0"}
    assert set(scheduled(made)) == {"a0", "b0", "c0", "d0"}


def test_newcomers_without_end_take_every_other_step():
    made = Scheduler(PageTable(400, 4), max_batch_size=4, num_tokens_per_iter=32)
    steady = sequence("steady", "steady", new=20)
    made.add(steady)
    steps = 0
    while len(steady) < steady.limit:
        name = f"n{steps}"
        made.add(sequence(name, name, new=1, start=steps + 1))
        plan = made.schedule()
        made.commit(plan, [7] * len(plan.drawing))
        for each in plan.sequences:
            if len(each) == each.limit and each is not steady:
                made.finish(each)
        steps += 1
    assert steps <= 2 * 20 + 1


def test_steps_are_short_while_several_owners_are_about():
    now = [0.0]
    made = Scheduler(PageTable(400, 4), max_batch_size=6, num_tokens_per_iter=64, most_decodes=2)
    made._short_steps = ShortSteps(2, clock=lambda: now[0])
    for number in range(5):
        made.add(sequence(f"a{number}", "a", new=90, start=number))
    assert len(scheduled(made)) == 5, "one owner has the whole step"
    assert len(scheduled(made)) == 5
    made.add(sequence("b", "b", new=90, start=9))
    assert set(scheduled(made)) == {"b"}
    steps = [scheduled(made) for _ in range(6)]
    assert [len(step) for step in steps] == [2] * 6
    assert Counter(name for step in steps for name in step) == dict.fromkeys(["a0", "a1", "a2", "a3", "a4", "b"], 2)
    made.add(sequence("a5", "a", prompt=20, new=90, start=10))
    made.finish(made.running[0])
    assert scheduled(made).keys() & {"a5"}, "prompts are taken in beside those whose turn it is"
    now[0] = 10.1
    assert len(scheduled(made)) == 6


def test_a_step_of_newcomers_that_failed_can_be_scheduled_anew():
    made = Scheduler(PageTable(400, 4), max_batch_size=4, num_tokens_per_iter=32)
    made.add(sequence("a", "a"))
    scheduled(made)
    made.schedule()
    made.add(sequence("b", "b", start=1))
    assert [each.request_id for each in made.schedule().sequences] == ["b"]
    plan = made.schedule()
    assert sorted((each.request_id, each.scheduled) for each in plan.sequences) == [("a", 1), ("b", 8)]
    made.commit(plan, [7, 7])
    made.check()
