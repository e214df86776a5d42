import random

import pytest

from pipelines.data.mixture import shares


def test_blocks_go_by_weight_and_what_is_left_to_the_largest_fraction():
    assert shares(128, {"chat": 3, "code": 1}) == {"chat": 96, "code": 32}
    assert shares(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert shares(10, {"c": 2, "b": 1, "a": 1}) == {"a": 3, "b": 2, "c": 5}
    assert shares(7, {"only": 0.1}) == {"only": 7}


def test_weights_are_taken_as_they_are_written_and_in_no_order():
    generator = random.Random(0)
    for _ in range(200):
        weights = {f"p{i}": generator.uniform(0.1, 5) for i in range(generator.randint(1, 6))}
        samples = generator.randint(200, 2000)
        found = shares(samples, weights)
        turned = dict(sorted(weights.items(), reverse=True))
        assert found == shares(samples, turned) and sum(found.values()) == samples
        total = sum(weights.values())
        assert all(abs(found[name] - samples * weight / total) < 1 for name, weight in weights.items())


def test_a_part_that_gets_nothing_is_named():
    with pytest.raises(ValueError, match=r"parts\.code gets no block: its weight 0\.01 of 1\.01 is too .*samples=16"):
        shares(16, {"chat": 1, "code": 0.01})
