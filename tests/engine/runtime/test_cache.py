import random

import pytest

from engine.runtime.cache import PageTable, page_count, page_digest


def digests_of(tokens, page_len):
    digests = []
    for start in range(0, len(tokens) - page_len + 1, page_len):
        digests.append(page_digest(digests[-1] if digests else b"", tokens[start : start + page_len]))
    return digests


def hold(table, tokens):
    """Find what is there, allocate the rest, publish all full pages: what a scheduler does to compute `tokens`."""
    digests = digests_of(tokens, table.page_len)
    found = table.lookup(digests)
    table.acquire(found)
    pages = found + table.allocate(table.pages_for(len(tokens)) - len(found))
    for page, digest in zip(pages, digests, strict=False):
        table.publish(page, digest)
    return pages


def test_a_released_prefix_is_found_again_and_a_changed_one_is_not():
    table = PageTable(8, 4)
    tokens = list(range(10))
    pages = hold(table, tokens)
    assert len(pages) == 3
    table.release(pages)
    table.check([])
    assert table.num_available == 8
    assert table.lookup(digests_of(tokens, 4)) == pages[:2]
    assert table.lookup(digests_of([99, *tokens[1:]], 4)) == [], "the second page hangs on the first"
    assert table.lookup(digests_of([*tokens[:4], 99, *tokens[5:]], 4)) == pages[:1]


def test_a_digest_covers_the_order_and_all_pages_before():
    assert page_digest(b"", [1, 2]) != page_digest(b"", [2, 1])
    assert page_digest(page_digest(b"", [1]), [3]) != page_digest(page_digest(b"", [2]), [3])
    assert page_digest(b"", [1, 0]) != page_digest(b"", [1])
    assert page_digest(b"", [2**40]) != page_digest(b"", [0])
    assert len(page_digest(b"", [1])) == 16


def test_an_unpublished_page_is_not_found():
    table = PageTable(2, 4)
    pages = table.allocate(1)
    assert table.lookup(digests_of([1, 2, 3, 4], 4)) == []
    table.release(pages)
    table.check([])
    assert table.lookup(digests_of([1, 2, 3, 4], 4)) == []


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    table = PageTable(4, 2)
    first = hold(table, [1, 2, 3, 4])
    second = hold(table, [1, 2, 3, 4])
    assert first == second
    table.check([first, second])
    table.release(first)
    table.check([second])
    assert table.num_available == 2
    table.release(second)
    table.check([])
    assert table.num_available == 4


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_tail():
    table = PageTable(4, 1)
    old, new = hold(table, [1, 2]), hold(table, [7, 8])
    table.release(old)
    table.release(new)
    table.release(hold(table, [1, 2]))  # used again: [7, 8] is now the older
    table.allocate(1)
    assert table.lookup(digests_of([7, 8], 1)) == new[:1]
    table.allocate(1)
    assert table.lookup(digests_of([7, 8], 1)) == []
    assert table.lookup(digests_of([1, 2], 1)) == old


def test_two_pages_of_one_content_leave_one_in_the_index():
    table = PageTable(4, 2)
    first, second = table.allocate(1), table.allocate(1)
    digest = page_digest(b"", [1, 2])
    table.publish(first[0], digest)
    table.publish(second[0], digest)
    assert table.lookup([digest]) == first
    table.release(second)
    table.check([first])
    table.release(first)
    table.check([])
    assert table.lookup([digest]) == first


def test_found_pages_do_not_count_twice():
    table = PageTable(3, 2)
    table.release(hold(table, [1, 2, 3, 4]))
    found = table.lookup(digests_of([1, 2, 3, 4], 2))
    assert table.num_available == 3
    assert table.num_available_beside(found) == 1


def random_operations(seed, count):
    rng = random.Random(seed)
    table = PageTable(rng.randint(3, 12), rng.choice([1, 2, 3]))
    held, contents, hits = [], {}, 0
    for _ in range(count):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(1, 3 * table.page_len))]
        digests = digests_of(tokens, table.page_len)
        found = table.lookup(digests)
        for page, digest in zip(found, digests, strict=False):
            assert contents[page] == digest, "a found page holds something else"
        missing = table.pages_for(len(tokens)) - len(found)
        if rng.random() < 0.5 and missing <= table.num_available_beside(found):
            table.acquire(found)
            new = table.allocate(missing)
            for page in new:
                contents[page] = None
            pages = found + new
            hits += len(found)
            for page, digest in zip(pages, digests, strict=False):
                if rng.random() < 0.8:
                    contents[page] = digest
                    table.publish(page, digest)
            held.append(pages)
        elif held:
            table.release(held.pop(rng.randrange(len(held))))
        table.check(held)
    for pages in held:
        table.release(pages)
    table.check([])
    assert table.num_available == table.num_pages
    return hits


def test_random_operations():
    assert sum(random_operations(seed, 100) for seed in range(30)) > 100


@pytest.mark.soak
def test_random_operations_soak(soak_row):
    for seed in range(300):
        random_operations(seed, 1000)
        soak_row["count"] += 1000


def test_check_sees_a_lost_page_a_wrong_holder_and_a_stray_index():
    for spoil in (
        lambda table: table._free.pop(),
        lambda table: table._free.append(table._free[0]),
        lambda table: table._index.update({b"x": 1}),
        lambda table: table._references.__setitem__(0, 2),
    ):
        table = PageTable(4, 2)
        pages = hold(table, [1, 2])
        table.check([pages])
        spoil(table)
        with pytest.raises(AssertionError):
            table.check([pages])
    table = PageTable(4, 2)
    hold(table, [1, 2])
    with pytest.raises(AssertionError, match="references"):
        table.check([])


def count(entry, **changes):
    options = {"page_bytes": 1000, "free_bytes": 100_000, "page_len": 16, "session_len": 64} | changes
    return page_count(entry, **options)


def test_page_count_is_a_share_or_a_number():
    assert count(0.5) == 50
    assert count(0.5, most=20) == 20
    assert count(7) == 7
    assert count(7, most=4) == 7, "a number asked for is given"
    assert count(4.0) == 4
    assert count("1MB") == 1000
    assert count("1MiB", most=4) == 1048, "an amount asked for is given"


def test_page_count_refuses_what_holds_no_session_and_names_the_options():
    small = ("0.003MB", {})
    for entry, changes in ((3, {}), (0.5, {"free_bytes": 7000}), (4, {"session_len": 65}), small):
        with pytest.raises(ValueError, match=r"cache_max_entry_count.*session_len.*needs [45].*quant_policy"):
            count(entry, **changes)
    for entry in (0, -1, float("nan"), 4.5, "4", "4gb", "0MB"):
        with pytest.raises(ValueError, match="cache_max_entry_count"):
            count(entry)
