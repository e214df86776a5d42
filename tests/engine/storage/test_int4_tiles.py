import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.storage import int4_tiles as tiles
from engine.storage.turbomind_layout import interleave_rotary, pack_awq, pack_nibbles

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))


def numbers(rows, columns, seed=0):
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def slow_tiles(values):
    """The formula of docs/formats.md (section 2), code by code."""
    k_size, n_size = values.shape
    words = [0] * (k_size * n_size // 8)
    for k in range(k_size):
        for n in range(n_size):
            lane, part = 4 * (n % 8) + (k % 8) // 2, 2 * ((k % 32) // 16) + (n % 32) // 16
            nibble = 4 * (k % 2) + 2 * ((k % 16) // 8) + (n % 16) // 8
            index = (((k // 32) * (n_size // 32) + n // 32) * 32 + lane) * 4 + part
            words[index] |= int(values[k, n]) << 4 * nibble
    return torch.tensor(words).to(torch.int32).reshape(k_size // 32, n_size // 32, 128)


@given(size=SIZES)
@settings(max_examples=8, deadline=None)
def test_every_code_stands_where_the_format_says_and_comes_back(size):
    values = numbers(size[0] * 32, size[1] * 32, size[2])
    packed = tiles.pack_tiles(pack_awq(values))
    assert torch.equal(packed, slow_tiles(values))
    assert torch.equal(tiles.unpack_tiles(packed), pack_awq(values))


@given(size=SIZES)
@settings(max_examples=8, deadline=None)
def test_alternating_columns_are_those_of_one_matrix(size):
    even, odd = (numbers(size[0] * 32, size[1] * 16, size[2] + at) for at in range(2))
    packed = tiles.pack_alternating_tiles(pack_awq(even), pack_awq(odd))
    assert torch.equal(packed, slow_tiles(torch.stack([even, odd], dim=-1).flatten(1)))
    first, second = tiles.unpack_alternating_tiles(packed)
    assert torch.equal(first, pack_awq(even)) and torch.equal(second, pack_awq(odd))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 5)])
def test_what_lies_on_a_gpu_is_unpacked_there(size, monkeypatch):
    values = [numbers(size[0] * 32, size[1] * columns, at) for at, columns in enumerate((32, 16, 16))]
    whole, *halves = [pack_awq(each) for each in values]
    one, two = tiles.pack_tiles(whole), tiles.pack_alternating_tiles(*halves)
    if torch.cuda.is_available():
        one, two = one.cuda(), two.cuda()
    else:
        monkeypatch.setattr(tiles, "_on_host", lambda words: False)  # the same operations of torch
    assert torch.equal(tiles.unpack_tiles(one).cpu(), whole)
    for found, expected in zip(tiles.unpack_alternating_tiles(two), halves, strict=True):
        assert torch.equal(found.cpu(), expected)
    assert torch.equal(tiles.unpack_tiles(one[:, -1:]).cpu(), whole[:, -4:])


@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_the_halves_of_heads_alternate_in_rotary_order(head_dim):
    values = numbers(32, head_dim * 3)
    even, odd = pack_awq(values).unflatten(1, (3, 2, head_dim // 16)).unbind(2)
    assert torch.equal(tiles.pack_alternating_tiles(even, odd), slow_tiles(interleave_rotary(values, head_dim)))


def test_columns_of_a_wider_matrix_are_packed_and_unpacked_where_they_lie():
    values = numbers(64, 32 * 7)
    words, packed = pack_awq(values), tiles.pack_tiles(pack_awq(values))
    some = words[32:, 4:12]  # tiles 1 and 2
    assert torch.equal(tiles.pack_tiles(some), packed[1:, 1:3])
    assert torch.equal(tiles.unpack_tiles(packed[1:, 1:3]), some)
    assert torch.equal(words, pack_awq(values)), "what is read is never changed"


@given(size=SIZES)
@settings(max_examples=20, deadline=None)
def test_packed_words_of_rows_become_awq_words_of_columns_and_back(size):
    values = numbers(size[0] * 8, size[1] * 8, size[2])  # [out, in]
    packed = pack_nibbles(values.unflatten(1, (-1, 8)))
    before = packed.clone()
    assert torch.equal(tiles.awq_from_packed(packed), pack_awq(values.t()))
    assert torch.equal(tiles.packed_from_awq(pack_awq(values.t())), packed) and torch.equal(packed, before)
