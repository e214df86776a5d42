import random

from pipelines.evaluation.overlap import RUN, calibration_overlap
from pipelines.evaluation.texts import Item


def item(token_ids, first_scored=1):
    return Item(token_ids=tuple(token_ids), first_scored=first_scored)


def counts(blocks, items, **options):
    found = calibration_overlap(blocks, items, **options)
    return found.seen_tokens, found.num_tokens, found.seen_items, found.num_items


def by_definition(blocks, items, run):
    """Every pair of runs, compared."""
    seen = 0
    for each in items:
        marked = set()
        for start in range(len(each.token_ids) - run + 1):
            wanted = list(each.token_ids[start : start + run])
            if any(list(block[at : at + run]) == wanted for block in blocks for at in range(len(block) - run + 1)):
                marked |= set(range(start, start + run))
        seen += len([position for position in marked if position >= each.first_scored])
    return seen


def test_a_run_counts_from_its_length_on():
    block = list(range(100, 200))
    outside = [1, 2, 3]
    for length, expected in ((RUN - 1, 0), (RUN, RUN), (RUN + 4, RUN + 4)):
        one = item([*outside, *block[20 : 20 + length], *outside])
        assert counts([block], [one]) == (expected, 5 + length, int(expected > 0), 1)


def test_only_what_is_scored_counts_and_a_prompt_helps_to_find_it():
    block = list(range(100, 200))
    question = item([*block[:20], 7, 8], first_scored=15)
    assert counts([block], [question]) == (5, 7, 1, 1)
    assert counts([block], [item(block[:20], first_scored=19)]) == (1, 1, 1, 1)
    assert counts([block], [item([*block[:20], 7], first_scored=20)]) == (0, 1, 0, 1)


def test_runs_do_not_go_over_the_ends_of_blocks_or_items():
    text = list(range(1000, 1040))
    assert counts([text[:10], text[10:22]], [item(text[:22])]) == (0, 21, 0, 1)
    assert counts([text], [item(text[:10]), item(text[10:20])]) == (0, 18, 0, 2)


def test_it_is_what_its_definition_says_whatever_the_order():
    generator = random.Random(1)
    blocks = [[generator.randint(0, 2) for _ in range(40)] for _ in range(6)]
    items = [item([generator.randint(0, 2) for _ in range(generator.randint(2, 30))]) for _ in range(20)]
    for run in (3, 4, 5, 6):
        expected = by_definition(blocks, items, run)
        assert counts(blocks, items, run=run)[0] == expected > 0
        assert counts(reversed(blocks), items, run=run)[0] == expected


def test_ids_that_differ_only_in_high_bytes_are_different():
    assert counts([[70000 + i for i in range(RUN)]], [item([70000 - 65536 + i for i in range(RUN)])])[0] == 0


def test_blocks_are_read_one_by_one():
    def stream():
        for number in range(3):
            yield list(range(100 * number, 100 * number + 50))

    assert counts(stream(), [item(range(205, 230))]) == (24, 24, 1, 1)


def test_an_item_is_seen_where_half_of_it_is_and_a_few_short_ones_are_notable():
    block = list(range(100, 200))
    long = item([*block[:RUN], *range(1000, 1000 + 20 * RUN)])
    found = calibration_overlap([block], [long] * 30)
    assert (found.seen_tokens, found.seen_items, found.notable) == (30 * (RUN - 1), 0, False)
    short = item([*block[: RUN + 1], 7, 8], first_scored=RUN - 1)
    found = calibration_overlap([block], [*[long] * 30, short, short])
    assert (found.seen_items, found.notable) == (2, True)
    assert "most of 2 of 32 items" in found.warning()
    assert calibration_overlap([[1, 2, 3]], [long]).notable is False
