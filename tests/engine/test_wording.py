import pytest

from engine.wording import LONGEST, cut, shown


@pytest.mark.parametrize("length", [0, LONGEST - 2, LONGEST])
def test_what_is_short_is_shown_whole(length):
    assert cut("x" * length) == "x" * length
    assert shown("x" * (LONGEST - 2)) == repr("x" * (LONGEST - 2))


def test_what_is_long_is_cut_and_its_length_said():
    assert cut("x" * 5000) == "x" * LONGEST + "... (5000 characters)"
    assert shown(["\n"] * 5000).endswith("... (30000 characters)") and "\n" not in shown(["\n"])
    assert cut("abc", 2) == "ab... (3 characters)"
