from benchmarks.rounds import Compared, are_enough, median_of

# What HTTP cost in some rounds, and what others took of the processors.
ROUNDS = [
    Compared({"http_overhead": cost, "seconds": cost}, others)
    for cost, others in ((0.9, 0.5), (0.3, 0.0), (0.1, 0.04), (-0.8, 0.06), (0.2, 0.01))
]


def test_rounds_that_others_disturbed_do_not_count() -> None:
    assert median_of(ROUNDS, 3) == {
        "http_overhead": 0.2,
        "seconds": 0.2,
        "overheads": "0.1 0.2 0.3",
        "others_share": 0.04,
    }
    assert median_of(ROUNDS, 5)["others_share"] == 0.5


def test_a_disturbed_round_is_made_again_but_not_for_ever() -> None:
    assert [are_enough(ROUNDS[:made], 3) for made in (3, 4, 5)] == [False, False, True]
    assert [are_enough(ROUNDS[:1] * made, 3) for made in (3, 5, 6)] == [False, False, True]
