import pytest
import torch

from pipelines.data.blocks import token_blocks

DOCUMENTS = [f"{chr(97 + i)}" * (10 + i) for i in range(20)]


def encode(text):
    return [0, *map(ord, text)]


def blocks(samples, length, *, sampling="random", seed=0, documents=DOCUMENTS):
    return token_blocks(documents, encode, samples=samples, sequence_length=length, sampling=sampling, seed=seed)


def test_first_takes_the_text_in_its_order():
    ids = [i for document in DOCUMENTS for i in encode(document)]
    taken = blocks(5, 16, sampling="first")
    assert taken.dtype == torch.int32 and taken.flatten().tolist() == ids[:80]


def test_random_is_the_seed_s_and_uses_no_token_twice():
    assert torch.equal(blocks(6, 16), blocks(6, 16)) and not torch.equal(blocks(6, 16), blocks(6, 16, seed=1))
    text = [f"{i}" for i in range(100)]
    one = token_blocks(text, lambda t: [int(t)], samples=50, sequence_length=2, sampling="random", seed=3)
    assert sorted(one.flatten().tolist()) == list(range(100))


def test_random_draws_from_the_whole_of_a_long_text():
    drawn = token_blocks(
        ["x"], lambda t: list(range(10_000)), samples=20, sequence_length=10, sampling="random", seed=0
    )
    starts = drawn[:, 0].tolist()
    assert starts == sorted(starts) and starts[0] < 3000 and starts[-1] > 7000


def test_documents_beyond_the_need_are_not_encoded():
    seen = []

    def counted(text):
        seen.append(text)
        return list(range(100))

    token_blocks(["x"] * 1000, counted, samples=2, sequence_length=50, sampling="random", seed=0)
    assert len(seen) == 4


def test_too_short_a_text_names_the_knobs():
    with pytest.raises(
        ValueError,
        match=r"410 tokens: 25 blocks .*=16, but calibration.samples=40. Lower .*samples to 25 or .*length to 10, or",
    ):
        blocks(40, 16)
    with pytest.raises(ValueError, match=r"0 blocks .* Lower calibration.sequence_length to 410, or give"):
        blocks(1, 2000)
    with pytest.raises(ValueError, match=r"calibration\.samples=400\. Give a longer text"):
        blocks(400, 2000)


def test_an_unknown_sampling():
    with pytest.raises(ValueError, match="sampling=best must be random, first or stratified"):
        blocks(1, 4, sampling="best")


def test_strata_are_documents_by_length_cut_into_equal_parts():
    documents = ["d" * 40, "a" * 10, "c" * 30, "b" * 20]
    taken = token_blocks(documents, lambda t: [ord(c) for c in t], samples=4, sequence_length=25, sampling="stratified")
    text = "a" * 10 + "b" * 20 + "c" * 30 + "d" * 40
    assert ["".join(map(chr, row)) for row in taken.tolist()] == [text[i : i + 25] for i in (0, 25, 50, 75)]


def test_strata_take_a_long_text_from_end_to_end_and_need_no_seed():
    one = token_blocks(["x"], lambda t: list(range(10_000)), samples=20, sequence_length=10, sampling="stratified")
    assert one[:, 0].tolist() == [500 * i for i in range(20)]
    assert torch.equal(
        one,
        token_blocks(
            ["x"], lambda t: list(range(10_000)), samples=20, sequence_length=10, sampling="stratified", seed=9
        ),
    )


def test_strata_encode_what_they_need_alone_and_use_no_token_twice():
    documents = [chr(97 + i % 26) * (50 + i) for i in range(100)]
    seen = []

    def counted(text):
        seen.append(text)
        return [1000 * len(text) + i for i in range(len(text))]

    taken = token_blocks(documents, counted, samples=10, sequence_length=16, sampling="stratified")
    tokens = taken.flatten().tolist()
    assert len(set(tokens)) == len(tokens) and len(seen) <= 30
    lengths = [row[0] // 1000 for row in taken.tolist()]
    assert lengths == sorted(lengths) and lengths[0] < 60 and lengths[-1] > 140


def test_a_stratum_that_is_too_short_is_an_error_even_if_the_text_is_long():
    def encode(text):  # the short documents hold hardly a token a character
        return [0] * (len(text) // 50 if len(text) < 1000 else len(text))

    with pytest.raises(
        ValueError, match=r"20 in the shortest of 2 equal parts, below .*=64, .*samples=2. Lower .*to 20"
    ):
        token_blocks(["s" * 100] * 10 + ["l" * 1000], encode, samples=2, sequence_length=64, sampling="stratified")


def test_a_part_of_a_mixture_is_named_with_its_weight():
    with pytest.raises(
        ValueError, match=r"^parts\.web has 410 tokens: .* 40 of .*samples are .* Lower parts\.web\.weight or"
    ):
        token_blocks(DOCUMENTS, encode, samples=40, sequence_length=16, sampling="random", part="parts.web")


@pytest.mark.parametrize("sampling", ["random", "first", "stratified"])
def test_one_token_and_no_more(sampling):
    """Data of one token, and data one token short of a block."""
    with pytest.raises(ValueError, match=r"1 tokens: .* Give a longer text\.$"):
        token_blocks(["x"], lambda t: [7], samples=1, sequence_length=2, sampling=sampling)
    with pytest.raises(ValueError, match=r"15 tokens: .* Lower calibration\.sequence_length to 15, or give a longer"):
        token_blocks(["x" * 15], lambda t: [7] * len(t), samples=1, sequence_length=16, sampling=sampling)
    whole = token_blocks(["x" * 16], lambda t: [7] * len(t), samples=1, sequence_length=16, sampling=sampling)
    assert whole.tolist() == [[7] * 16]
