import random

from engine.runtime.page_rows import PageRows
from engine.runtime.sequence import Sequence


def sequence(pages):
    return Sequence(request_id="x", tokens=[1], limit=9, pages=pages)


def plain(sequences):
    """The table of these sequences, written from nothing."""
    width = max((len(one.pages) for one in sequences), default=0)
    return [[*one.pages, *[0] * (width - len(one.pages))] for one in sequences]


def test_a_table_without_sequences_is_empty():
    assert PageRows(2, 3).of([]).shape == (0, 0)


def test_another_list_of_the_same_length_is_another_row():
    rows, one = PageRows(2, 3), sequence([4, 5])
    assert rows.of([one]).tolist() == [[4, 5]]
    one.pages = [4, 6]  # given back, and admitted anew with what is left of its prefix
    assert rows.of([one]).tolist() == [[4, 6]]
    assert rows.version == 2
    rows.of([one])
    assert rows.version == 2, "nothing has changed"


def test_a_row_is_what_the_scheduler_makes_of_it():
    rng, rows = random.Random(3), PageRows(5, 7)
    alive, before = [sequence([rng.randrange(1, 99)]) for _ in range(3)], None
    for _ in range(2000):
        one = rng.choice(alive)
        match rng.randrange(5):
            case 0 if len(alive) < 5:
                alive.append(sequence([rng.randrange(1, 99) for _ in range(rng.randint(1, 7))]))
            case 1 if len(alive) > 1:
                alive.remove(one)
            case 2 if len(one.pages) < 7:
                one.pages += [rng.randrange(1, 99)]
            case 3:
                one.pages = [rng.randrange(1, 99) for _ in range(rng.randint(1, 7))]
            case 4:
                rng.shuffle(alive)
        taken = alive[: rng.randint(1, 5)]
        version, table = rows.version, rows.of(taken).tolist()
        assert table == plain(taken)
        assert rows.version > version or table == before
        before = table
