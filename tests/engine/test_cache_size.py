import pytest

from engine.cache_size import is_cache_size, memory_bytes, num_pages

AMOUNTS = {
    "1MB": 10**6,
    "4GB": 4 * 10**9,
    "512MiB": 512 * 2**20,
    "1GiB": 2**30,
    "1.5 GB": 1_500_000_000,
    "2.3GB": 2_300_000_000,
    "0.5MB": 500_000,
}


@pytest.mark.parametrize("amount", AMOUNTS)
def test_an_amount_is_exactly_so_many_bytes(amount):
    assert memory_bytes(amount) == AMOUNTS[amount]
    assert is_cache_size(amount)


@pytest.mark.parametrize("size", [0.5, 0.001, 1, 1.0, 20, 10**9])
def test_a_number_is_a_share_or_pages(size):
    assert is_cache_size(size)


@pytest.mark.parametrize(
    "size",
    [
        *("", "4", "4G", "4gb", "4KB", "GB", "-1GB", "0GB", "0.0MB", "1e3GB", "4  GB", " 4GB", "4GB ", "4GB\n", "٤GB"),
        *(".5GB", "1.GB", "1_0GB", "9" * 400 + "GB", 0, 0.0, -1, 1.5, float("nan"), float("inf"), True, None, [1]),
    ],
)
def test_anything_else_is_none(size):
    assert not is_cache_size(size)
    with pytest.raises(ValueError, match=r"cache_max_entry_count is .*share.*pages.*512MB or 4GB"):
        num_pages(size, page_bytes=1, free_bytes=1)


def test_what_a_size_buys():
    bought = {size: num_pages(size, page_bytes=1000, free_bytes=100_000) for size in (0.5, 0.999, 7, "1MB", "1MiB")}
    assert bought == {0.5: 50, 0.999: 99, 7: 7, "1MB": 1000, "1MiB": 1048}
