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
