import pytest

from pipelines.units import human_size, human_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (12.4, "12 s"), (99, "99 s"), (150, "2 min"), (5999, "100 min"), (9000, "2.5 h")],
)
def test_times_are_short(seconds, text):
    assert human_time(seconds) == text


def test_sizes_are_in_the_unit_that_keeps_them_below_a_thousand():
    sizes = [human_size(size) for size in (999, 1500, 2_500_000, 3e9, 4e12)]
    assert sizes == ["999 B", "1.5 kB", "2.5 MB", "3.0 GB", "4.0 TB"]
