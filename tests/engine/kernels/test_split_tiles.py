"""Which programs a product has whose last tiles are split."""

import random

import pytest

from tests.engine.kernels.triton_device import DEVICE  # noqa: F401  before any kernel

# isort: split
from engine.kernels import splits
from tests.engine.kernels import gluon_on_cpu


@pytest.fixture(scope="module")
def split_tiles():
    return gluon_on_cpu.kernels("int4_fragments", "split_tiles")[1]


def shares(split_tiles, plan, turns):
    """What `place` says to every program."""
    gl, found = split_tiles.gl, []
    for program in range(plan.programs):
        gl.ids, gl.grid = (program, 0, 0), (plan.programs, 1, 1)
        tile, shared, part, begin, end = split_tiles.place(plan.whole, plan.lead, plan.parts, turns)
        found.append((int(tile), bool(shared), int(part), int(begin), int(end)))
    return found


def test_every_turn_of_every_tile_is_one_programs(split_tiles):
    drawn = random.Random(0)
    for _ in range(200):
        tiles, places, turns = drawn.randint(1, 60), drawn.randint(1, 40), drawn.randint(1, 12)
        plan = split_tiles.plan(tiles, places, drawn.randint(1, 9), turns, 4096)
        programs = shares(split_tiles, plan, turns)
        done = sorted((tile, turn) for tile, _, _, begin, end in programs for turn in range(begin, end))
        assert done == [(tile, turn) for tile in range(tiles) for turn in range(turns)]
        assert max(end - begin for *_, begin, end in programs) == plan.longest
        for tile, shared, part, begin, end in programs:
            assert begin < end and shared == (tile >= plan.whole) and part < plan.parts
            assert shared or (begin, end) == (0, turns)


def test_whole_tiles_come_first_and_fill_the_card(split_tiles):
    plan = split_tiles.plan(172, 132, 3, 8, 128 * 256)
    assert (plan.programs, plan.whole, plan.lead) == (132 + 40 * 3, 132, 3)
    assert [tile for tile, *_ in shares(split_tiles, plan, 8)] == [*range(172), *range(132, 172), *range(132, 172)]


def test_the_first_part_is_a_places_share_where_that_is_more(split_tiles):
    """96 tiles of 32 turns on 132 places: 24 turns, and three times 8 in each place that is left."""
    plan = split_tiles.plan(96, 132, 2, 32, 128 * 256)
    assert (plan.whole, plan.lead, plan.longest) == (0, 24, 24)


def test_tiles_that_go_round_evenly_and_parts_without_room_are_whole(split_tiles):
    assert split_tiles.plan(264, 132, 3, 8, 4096) == (264, 264, 1, 8, 8)
    assert split_tiles.plan(100, 132, 3, 8, splits.PARTIAL_FLOATS // 100) == (100, 100, 1, 8, 8)
    assert split_tiles.plan(4, 132, 8, 2, 4096).parts == 2


def test_parts_that_are_likely_end_the_last_place_first(split_tiles):
    assert split_tiles.likely_parts(172, 132, 8)[0] == 3  # 40 tiles left for 132 places
    assert split_tiles.likely_parts(96, 132, 8)[0] == 2
    assert split_tiles.likely_parts(264, 132, 8) == split_tiles.likely_parts(172, 132, 1) == []
