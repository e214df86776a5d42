import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.storage import turbomind_layout as layout


def _numbers(*shape, high=16, dtype=torch.uint8):
    return torch.randint(0, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def test_rotary_columns_become_adjacent_pairs_as_the_formula_says():
    head_dim, heads = 6, 2
    columns = torch.arange(head_dim * heads).reshape(1, -1)
    moved = layout.interleave_rotary(columns, head_dim)[0]
    for head in range(heads):
        for pair in range(head_dim // 2):
            for b in range(2):
                old = head * head_dim + b * (head_dim // 2) + pair
                assert moved[head * head_dim + 2 * pair + b] == old
    assert torch.equal(layout.separate_rotary(moved[None], head_dim), columns)


def test_a_matrix_that_is_a_transposed_one_is_treated_alike():
    matrix = _numbers(24, 40, high=255).to(torch.int16)
    turned = matrix.t().contiguous().t()
    assert torch.equal(layout.interleave_rotary(turned, 8), layout.interleave_rotary(matrix, 8))
    assert torch.equal(layout.transposed(turned), matrix) and layout.transposed(turned).is_contiguous()
    pieces = {"cut": "columns", "join": "concatenate", "pieces": (20, 20), "stored": 48}
    ours, theirs = (layout.split_ranks([one, one], 2, **pieces) for one in (turned, matrix))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_awq_words_unpack_to_what_was_packed(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (shape[0], shape[1] * 8), dtype=torch.uint8, generator=generator)
    assert torch.equal(layout.unpack_awq(layout.pack_awq(values)), values)


def test_awq_words_hold_columns_in_the_gemm_order():
    word = int(layout.pack_awq(torch.arange(8, dtype=torch.uint8)[None])[0, 0]) & 0xFFFFFFFF
    assert [(word >> (4 * p)) & 15 for p in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_scales_zeros_are_64_plus_zero_and_scale_as_two_halves():
    scales = torch.tensor([[0.5, -1.25, 6e-8, 65504.0]], dtype=torch.float16)
    zeros = torch.tensor([[0, 7, 15, 8]], dtype=torch.uint8)
    words = layout.pack_scales_zeros(scales, zeros)
    assert words.dtype == torch.int32
    assert words.view(torch.float16).view(1, 4, 2)[..., 0].tolist() == [[64.0, 71.0, 79.0, 72.0]]
    back_scales, back_zeros = layout.unpack_scales_zeros(words)
    assert torch.equal(back_scales, scales) and torch.equal(back_zeros, zeros)


@pytest.mark.parametrize("low", [0x5401, 0x5500, 0xD400, 0])
def test_a_zero_point_that_is_none_is_refused(low):
    with pytest.raises(ValueError, match="0 to 15"):
        layout.unpack_scales_zeros(torch.tensor([[low]], dtype=torch.int32))


@given(
    tp=st.sampled_from([1, 2, 4]),
    cut=st.sampled_from(["columns", "rows", "copies"]),
    interleave=st.booleans(),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    spare=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_ranks_join_to_what_was_split_however_much_is_filled_up(tp, cut, interleave, sizes, spare):
    join = "interleave" if interleave and cut == "columns" else "concatenate"
    sizes = [sizes[0]] * len(sizes) if join == "interleave" else sizes
    sizes = sizes if cut == "columns" else sizes[:1]
    shapes = [(8, size) if cut == "columns" else (size, 8) for size in sizes]
    matrices = [_numbers(*shape, high=100) + 1 + index for index, shape in enumerate(shapes)]
    pieces = [-(-size // tp) for size in sizes]
    stored = sum(pieces) + spare
    ranks = layout.split_ranks(matrices, tp, cut=cut, join=join, pieces=pieces, stored=stored)
    assert len(ranks) == tp
    joined = layout.join_ranks(ranks, sizes, cut=cut, join=join, pieces=pieces)
    assert all(torch.equal(a, b) for a, b in zip(joined, matrices, strict=True))
    if cut != "copies":
        assert all(rank.shape == ((8, stored) if cut == "columns" else (stored, 8)) for rank in ranks)
        assert sum(int(rank.count_nonzero()) for rank in ranks) == sum(matrix.numel() for matrix in matrices)


def _split(matrices, join):
    pieces = [matrix.shape[1] // 2 for matrix in matrices]
    return layout.split_ranks(matrices, 2, cut="columns", join=join, pieces=pieces, stored=sum(pieces))


def test_a_rank_holds_its_share_of_q_k_and_v_side_by_side():
    q, k, v = torch.arange(8)[None], 100 + torch.arange(4)[None], 200 + torch.arange(4)[None]
    assert _split([q, k, v], "concatenate")[1].tolist() == [[4, 5, 6, 7, 102, 103, 202, 203]]


def test_gate_and_up_alternate():
    gate, up = torch.arange(4)[None], 100 + torch.arange(4)[None]
    assert _split([gate, up], "interleave")[1].tolist() == [[2, 102, 3, 103]]


def test_groups_that_are_cut_repeat_their_row_and_merge_again():
    rows = torch.tensor([[1, 2], [3, 4]])
    assert layout.refine_groups(rows, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert torch.equal(layout.merge_groups(layout.refine_groups(rows, 3), 3), rows)
    with pytest.raises(ValueError, match="parts of one group"):
        layout.merge_groups(torch.tensor([[1, 2], [1, 3]]), 2)


def test_vocabulary_is_padded_with_zero_rows():
    assert layout.pad_rows(torch.ones(5, 2), 4).sum(1).tolist() == [2, 2, 2, 2, 2, 0, 0, 0]
    assert layout.pad_rows(torch.ones(4, 2), 4).shape == (4, 2)
