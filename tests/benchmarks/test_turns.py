import time

from benchmarks.turns import LEAST_ROUNDS, Turns, choose_clock, take_turns


def test_turns_alternate_and_the_first_round_is_not_counted():
    order = []
    found = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0, threads=1, rest=0)
    assert order == ["a", "b"] * (LEAST_ROUNDS + 1)
    assert {name: len(turns.seconds) for name, turns in found.items()} == {"a": LEAST_ROUNDS, "b": LEAST_ROUNDS}


def test_they_go_on_for_as_long_as_was_asked():
    found = take_turns({"a": lambda: time.sleep(0.002)}, seconds=0.1, threads=2, rest=0)["a"]
    assert len(found.seconds) > LEAST_ROUNDS and found.clock.startswith("wall")
    assert found.best >= 0.002


def test_one_thread_is_timed_by_the_processors_clock():
    found = take_turns({"a": lambda: time.sleep(0.002)}, seconds=0, threads=1, rest=0)["a"]
    assert found.clock == "processor" and found.median < 0.002


def test_runs_that_made_way_for_others_count_only_where_there_are_no_better_ones():
    times = {"a": [(3.0, 1.0, 2), (2.0, 1.0, 0), (2.5, 1.0, 0)], "b": [(4.0, 1.0, 1), (5.0, 1.0, 0)]}
    assert choose_clock(times, 2) == {"a": Turns((2.0, 2.5), "wall"), "b": Turns((5.0,), "wall")}
    times["b"].pop()
    found = choose_clock(times, 2)
    assert found == {"a": Turns((3.0, 2.0, 2.5), "wall, interrupted"), "b": Turns((4.0,), "wall, interrupted")}


def test_the_best_and_the_middle_of_turns():
    turns = Turns((3.0, 1.0, 2.0, 9.0, 2.5), "wall")
    assert (turns.best, turns.median) == (1.0, 2.5)
